"""Documents in files, folders and rows, cut into chunks of similar size.

A text file is one document; JSONL and tables have one per row.  ``plan`` lists the chunks: small
files share a chunk, a larger JSONL is cut into ranges of bytes.  A row belongs to
the chunk in which it begins, so chunks can be read independently, in any order, and together give
every row once::

    row 1 \\n row 2 \\n row | 3 \\n row 4 \\n        chunk 0: rows 1 2 3, chunk 1: row 4
"""

from __future__ import annotations

import fnmatch
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamax.data.prepare import file_kinds
from llamax.data.prepare.file_kinds import (
    MAX_DOCUMENT,
    Row,
    decode,
    is_packed,
    kind_of,
    reading,
    refuse_packed,
    too_long,
    unreadable,
)
from llamax.data.prepare.folder_warnings import warn_of_files
from llamax.data.prepare.hub_dataset import dataset_on_hub
from llamax.data.prepare.json_stream import json_rows
from llamax.data.prepare.long_text import Text, read_text
from llamax.data.prepare.row_range import RowRange
from llamax.data.prepare.saved_dataset import files_by_purpose, is_saved
from llamax.data.prepare.tables import has_row_per_line, read_rows, scan
from llamax.data.prepare.unpack import BLOCK_BYTES
from llamax.data.prepare.unread import count_names
from llamax.runtime.errors import DataError
from llamax.runtime.hub_name import hub_name
from llamax.runtime.json_reader import JsonError, parse_json
from llamax.runtime.text import printable_line

MOST_CHUNKS = 4096
REMEDY = "correct or remove it"


@dataclass(frozen=True)
class Source:
    """Bytes start:stop of a file; ``version`` changes when the file does.

    ``rows``: whether it has a JSON object per line.
    """

    path: str
    start: int
    stop: int
    version: str
    rows: bool = False

    @property
    def packed(self) -> bool:
        return is_packed(Path(self.path))

    @property
    def size_bytes(self) -> int:
        return self.stop - self.start


Chunk = tuple[Source | RowRange, ...]


def plan(
    inputs: Sequence[str | Path],
    glob: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    out: Path | None = None,
    key: str = "text",
    left: list[str] | None = None,
    most: int = MAX_DOCUMENT,
) -> list[Chunk]:
    """The chunks of all inputs, in the order given, folders sorted.

    ``glob``: patterns of file names to take from folders; ``exclude``: patterns of file and folder
    names to skip in folders; ``out``: a resolved path below which nothing is read; ``key``: column
    of the text in tables; ``left``: receives the files of folders that are not taken; ``most``:
    bytes of the longest row.  Raises DataError for an input that is missing or cannot be read, and
    if there is no text.
    """
    left = [] if left is None else left
    found = [
        (path, path.stat(), named, split)
        for path, named, split in _files(inputs, glob, exclude, out, left)
    ]
    for folder in filter(Path.is_dir, map(Path, inputs)):
        own = [path for path, _, _, split in found if not split and path.is_relative_to(folder)]
        warn_of_files(folder, own)
    size = max(file_kinds.CHUNK_BYTES, sum(stat.st_size for _, stat, *_ in found) // MOST_CHUNKS)
    chunks: list[Chunk] = []
    small: list[Source] = []
    held = 0
    for path, stat, named, split in found:
        refuse_packed(path)
        if not stat.st_size:
            left.append(str(path))
            continue
        version = f"{stat.st_size}-{stat.st_mtime_ns}"
        kind = kind_of(path)
        if kind == "json":
            kind = "jsonl" if has_row_per_line(path, key, most) else _table_in_json(path, key, most)
        if kind not in ("", "jsonl"):
            ranges = _table(path, key, named, most)
            if not ranges:
                left.append(str(path))
            chunks += [(replace(each, split=split),) for each in ranges]
            continue
        whole = Source(str(path), 0, stat.st_size, version, kind == "jsonl")
        if held + stat.st_size > size and small:
            chunks.append(tuple(small))
            small, held = [], 0
        if whole.rows and not whole.packed and stat.st_size > size:
            for start in range(0, stat.st_size, size):
                stop = min(start + size, stat.st_size)
                chunks.append((replace(whole, start=start, stop=stop),))
        else:
            small.append(whole)
            held += stat.st_size
    if small:
        chunks.append(tuple(small))
    if not chunks:
        tables = [name for name in left if kind_of(Path(name))]
        empty = f", only tables that have no row or no column {key!r}: {', '.join(tables[:8])}"
        why = empty if tables else ""
        only = "" if [*glob] == ["*"] else f" in files like {', '.join(glob)}"
        raise DataError(
            f"{', '.join(map(str, inputs))}: holds no text{only}{why}; give text files, JSONL "
            "files or folders of them"
        )
    return chunks


def is_only_text(chunks: Sequence[Chunk]) -> bool:
    """Whether the chunks hold nothing but one text file."""
    sources = [source for chunk in chunks for source in chunk]
    return len(sources) == 1 and isinstance(sources[0], Source) and not sources[0].rows


def _table_in_json(path: Path, key: str, most: int) -> str:
    """The kind of a .json file with one value: "json" if it holds rows with ``key``, else text."""
    try:
        first = next(json_rows(path, most), None)
    except DataError:
        return ""
    return "json" if isinstance(first, dict) and isinstance(first.get(key), str) else ""


def _table(path: Path, key: str, named: bool, most: int) -> list[RowRange]:
    """The ranges of a table; none if it has no row, or lacks the column ``key``.

    Raises DataError for a table without that column that was ``named``.
    """
    if not (ranges := list(scan(path, most))):
        return []
    _, first = next(read_rows(ranges[0], most), ("", {}))
    if key in first:
        return ranges
    if named:
        columns = printable_line(", ".join(first), 200)
        if "input_ids" in first:
            raise DataError(
                f"{path}: holds token ids (columns: {columns}), which are not read; give the text "
                "or the rows that they were made from"
            )
        raise DataError(
            f"{path}: is a table without a column {key!r} (columns: {columns or 'none'}); "
            "name the column of the text with `key`, or use `template` for rows of questions"
        )
    return []


def _files(
    inputs: Sequence[str | Path],
    glob: Sequence[str],
    exclude: Sequence[str],
    out: Path | None,
    left: list[str],
) -> Iterator[tuple[Path, bool, str]]:
    """The files of all inputs, whether each was named itself rather than its folder, its split."""
    for source in inputs:
        path = Path(source)
        if not str(source):
            raise DataError("an input is empty; name a file or a folder ('.' is this one)")
        if path.is_file():
            yield path, True, ""
        elif out is not None and path.is_dir() and path.resolve() == out:
            raise DataError(f"{path}: is both an input and `out`; choose another `out`")
        elif path.is_dir():
            for each, split in sorted(_below(path, exclude, out, left)):
                if any(fnmatch.fnmatch(each.name, pattern) for pattern in glob):
                    yield each, is_saved(path), split
                else:
                    left.append(str(each))
        elif path.exists():
            raise DataError(f"{path}: is neither a file nor a folder; write its text to a file")
        elif (on_hub := hub_name(source, "dataset")) is not None:
            paths = dataset_on_hub(on_hub, "train", text=True)["train"]
            yield from ((path, True, "") for path in paths)
        else:
            raise DataError(f"{path}: no such file or folder; check the path")


def _below(
    folder: Path, exclude: Sequence[str], out: Path | None, left: list[str]
) -> Iterator[tuple[Path, str]]:
    """The files at any depth and their splits; DataError for a folder that cannot be listed.

    Links to folders are not followed, so no file comes twice and there are no loops.  What
    ``exclude`` names goes to ``left``.
    """

    def wanted(name: str, base: str, end: str = "") -> bool:
        if name.startswith(".") or name == "__pycache__":
            return False
        excluded = any(fnmatch.fnmatch(name, pattern) for pattern in exclude)
        if excluded:
            left.append(str(Path(base, name)) + end)
        return not excluded

    def refuse(error: OSError) -> None:
        raise unreadable(str(error.filename), error)

    for base, folders, names in os.walk(folder, onerror=refuse):
        if is_saved(Path(base)):
            folders.clear()
            yield from files_by_purpose(Path(base), left)
            continue
        folders[:] = [name for name in sorted(folders) if wanted(name, base, "/")]
        if out is not None and out.name in folders and Path(base, out.name).resolve() == out:
            folders.remove(out.name)
        names = [name for name in names if wanted(name, base)]
        yield from ((path, "") for path in (Path(base, name) for name in names) if path.is_file())


def documents(
    chunk: Chunk, key: str, unread: Counter[str] | None = None, most: int = MAX_DOCUMENT
) -> Iterator[Text]:
    """The texts of a chunk; DataError names the file and the place of a mistake.

    ``unread`` counts the rows that hold something under other keys, by key; ``most``: bytes of the
    longest row.
    """
    unread = Counter() if unread is None else unread
    for source in chunk:
        if isinstance(source, RowRange):
            for place, row in read_rows(source, most):
                problem = _problem(row, key)
                if problem:
                    raise DataError(f"{place}: the row {problem}")
                _count_others(row, key, unread)
                yield row[key]
        else:
            if source.rows:
                yield from _rows(source, key, unread, most)
            else:
                yield read_text(source.path)


def _count_others(row: Row, key: str, unread: Counter[str]) -> None:
    names = (k for k, value in row.items() if k != key and value not in (None, "", [], {}))
    count_names(unread, names)


def _rows(source: Source, key: str, unread: Counter[str], most: int) -> Iterator[str]:
    """The texts of the rows that begin in start:stop."""
    with reading(source.path) as file:
        at, number, packed = source.start, 0, source.packed
        if at:
            at -= 1
            file.seek(at)
            while at < source.stop and (piece := file.readline(BLOCK_BYTES)):
                at += len(piece)
                if piece.endswith(b"\n"):
                    break
        while packed or at < source.stop:
            line = file.readline(most + 1)
            if not line:
                return
            number += 1
            if len(line) > most:
                place = f"{source.path}:{number + _lines_before(source)}: the row"
                raise too_long(place, most)
            size = len(line)
            if line.strip():
                row = _row(line, key, source, at, number)
                line = b""  # a long one is not held while its text is encoded
                _count_others(row, key, unread)
                yield str(row[key])
            at += size


def _row(line: bytes, key: str, source: Source, at: int, number: int) -> Row:
    text = decode(line, source.path, at)
    row: Any = None
    try:
        row = parse_json(text, False)
        problem = _problem(row, key)
    except JsonError as error:
        problem = f"{error}; {REMEDY}"
    if problem:
        line_number = number + _lines_before(source)
        raise DataError(f"{source.path}:{line_number}: the row {problem}")
    return dict(row)


def _problem(row: Any, key: str) -> str:
    """What is wrong with a row of text, and what to do; empty if nothing is."""
    if not isinstance(row, dict):
        return f"is {type(row).__name__}, not an object; {REMEDY}"
    if key not in row:
        names = printable_line(", ".join(sorted(row)) or "none", 200)
        ids = ", and token ids are not read" if "input_ids" in row else ""
        return (
            f"has no text under key {key!r} (keys: {names}{ids}); name the key of the text with "
            "`key`, or use `template`"
        )
    if not isinstance(row[key], str):
        return f"has no text under key {key!r} (it is {type(row[key]).__name__}); {REMEDY}"
    try:
        row[key].encode()
    except UnicodeEncodeError as error:
        return f"holds half a character (\\u{ord(row[key][error.start]):04x}); {REMEDY}"
    return ""


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
