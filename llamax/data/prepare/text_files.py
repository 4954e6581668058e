"""Documents in files, folders and JSONL rows, cut into chunks of similar size.

A text file is one document; a JSONL file has one per row.  ``plan`` lists the chunks without
reading: small files share a chunk, a larger JSONL is cut into ranges of bytes.  A row belongs to
the chunk in which it begins, so chunks can be read independently, in any order, and together give
every row once::

    row 1 \\n row 2 \\n row | 3 \\n row 4 \\n        chunk 0: rows 1 2 3, chunk 1: row 4
"""

from __future__ import annotations

import fnmatch
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamax.runtime.errors import DataError

CHUNK_BYTES = 2**20  # at least
MOST_CHUNKS = 4096
ROWS = (".jsonl", ".ndjson")
MARK = "\ufeff"  # byte order mark


@dataclass(frozen=True)
class Source:
    """Bytes start:stop of a file; ``version`` changes when the file does."""

    path: str
    start: int
    stop: int
    version: str

    @property
    def packed(self) -> bool:
        return self.path.endswith(".gz")

    @property
    def rows(self) -> bool:
        return self.path.removesuffix(".gz").endswith(ROWS)


Chunk = tuple[Source, ...]


def plan(
    inputs: Sequence[str | Path],
    glob: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    out: Path | None = None,
) -> list[Chunk]:
    """The chunks of all inputs, in the order given, folders sorted.

    ``glob``: patterns of file names to take from folders; ``exclude``: patterns of file and folder
    names to skip in folders; ``out``: a resolved path below which nothing is read.  Raises
    DataError for an input that is missing or cannot be read, and if there is no text.
    """
    files = [(path, path.stat()) for path in _files(inputs, glob, exclude, out)]
    size = max(CHUNK_BYTES, sum(stat.st_size for _, stat in files) // MOST_CHUNKS)
    chunks: list[Chunk] = []
    small: list[Source] = []
    held = 0
    for path, stat in files:
        version = f"{stat.st_size}-{stat.st_mtime_ns}"
        whole = Source(str(path), 0, stat.st_size, version)
        if held + stat.st_size > size and small:
            chunks.append(tuple(small))
            small, held = [], 0
        if whole.rows and not whole.packed and stat.st_size > size:
            for start in range(0, stat.st_size, size):
                stop = min(start + size, stat.st_size)
                chunks.append((Source(str(path), start, stop, version),))
        else:
            small.append(whole)
            held += stat.st_size
    if small:
        chunks.append(tuple(small))
    if not any(source.stop for chunk in chunks for source in chunk):
        raise DataError(
            f"{', '.join(map(str, inputs))}: holds no text (files matching {', '.join(glob)}); "
            "give text files, JSONL files or folders of them"
        )
    return chunks


def _files(
    inputs: Sequence[str | Path], glob: Sequence[str], exclude: Sequence[str], out: Path | None
) -> Iterator[Path]:
    for source in inputs:
        path = Path(source)
        if not str(source):
            raise DataError("an input is empty; name a file or a folder ('.' is this one)")
        if path.is_file():
            yield path
        elif out is not None and path.is_dir() and path.resolve() == out:
            raise DataError(f"{path}: is both an input and `out`; choose another `out`")
        elif path.is_dir():
            found = _below(path, exclude, out)
            yield from sorted(
                each for each in found if any(fnmatch.fnmatch(each.name, p) for p in glob)
            )
        elif path.exists():
            raise DataError(f"{path}: is neither a file nor a folder; write its text to a file")
        else:
            raise DataError(f"{path}: no such file or folder; check the path")


def _below(folder: Path, exclude: Sequence[str], out: Path | None) -> Iterator[Path]:
    """The files at any depth; DataError for a folder that cannot be listed.

    Links to folders are not followed, so no file comes twice and there are no loops.
    """

    def wanted(name: str) -> bool:
        hidden = name.startswith(".") or name == "__pycache__"
        return not hidden and not any(fnmatch.fnmatch(name, pattern) for pattern in exclude)

    def refuse(error: OSError) -> None:
        raise unreadable(str(error.filename), error)

    for base, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = filter(wanted, folders)
        if out is not None and out.name in folders and Path(base, out.name).resolve() == out:
            folders.remove(out.name)
        yield from (
            path for path in (Path(base, name) for name in names if wanted(name)) if path.is_file()
        )


def documents(chunk: Chunk, key: str) -> Iterator[str]:
    """The texts of a chunk; DataError names the file and the place of a mistake."""
    for source in chunk:
        yield from _rows(source, key) if source.rows else [_text(source)]


def _text(source: Source) -> str:
    try:
        with gzip.open(source.path) if source.packed else open(source.path, "rb") as file:
            return decode(file.read(), source.path, 0)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(source.path, error) from None


def _rows(source: Source, key: str) -> Iterator[str]:
    """The texts of the rows that begin in start:stop."""
    try:
        with gzip.open(source.path) if source.packed else open(source.path, "rb") as file:
            at = source.start
            if at:
                file.seek(at - 1)
                at += len(file.readline()) - 1
            number = 0
            while source.packed or at < source.stop:
                line = file.readline()
                if not line:
                    return
                number += 1
                if line.strip():
                    yield _row(line, key, source, at, number)
                at += len(line)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(source.path, error) from None


def _row(line: bytes, key: str, source: Source, at: int, number: int) -> str:
    text = decode(line, source.path, at)
    try:
        row = json.loads(text)
        problem = "" if isinstance(row, dict) else f"is {type(row).__name__}, not an object"
    except (ValueError, RecursionError) as error:
        problem = f"is not JSON ({error})"
    if not problem and not isinstance(row.get(key), str):
        found = f"is {type(row[key]).__name__}" if key in row else f"is not among {sorted(row)}"
        problem = f"has no text under key {key!r} (it {found}); set `key`"
    if not problem:
        try:
            row[key].encode()
            return str(row[key])
        except UnicodeEncodeError as error:
            problem = f"holds half a character (\\u{ord(row[key][error.start]):04x})"
    line_number = number + _lines_before(source)
    raise DataError(f"{source.path}:{line_number}: the row {problem}; correct or remove it")


def _lines_before(source: Source) -> int:
    """The number of lines in the chunks before this one; read only for a message."""
    if not source.start:
        return 0
    lines = left = 0
    with open(source.path, "rb") as file:
        left = source.start
        while left > 0 and (piece := file.read(min(left, 2**20))):
            lines += piece.count(b"\n")
            left -= len(piece)
        return lines + (not piece.endswith(b"\n"))


def decode(raw: bytes, path: str, at: int) -> str:
    """The text of bytes at offset ``at`` of a file; DataError if they are not UTF-8 text.

    A byte order mark at the start of the file is removed.
    """
    try:
        text = raw.decode("utf-8")
        place = raw.find(b"\0")
    except UnicodeDecodeError as error:
        place = error.start
    if place < 0:
        return text if at else text.removeprefix(MARK)
    raise DataError(
        f"{path}: byte {at + place} is not UTF-8 text (0x{raw[place]:02x}); convert the file to "
        "UTF-8, or leave it out"
    )


def unreadable(path: str, error: Exception) -> DataError:
    """The error for a file that the system or a decompressor cannot read."""
    reason = getattr(error, "strerror", None) or error
    return DataError(f"{path}: cannot be read ({reason}); repair it or leave it out")
