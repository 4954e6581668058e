"""What kind of file something is, by its name and, for .json, by its beginning.

One place decides for text and for rows, and for every command::

    .jsonl .ndjson .jsonlines   an object a line: rows
    .json                       an object a line: rows; otherwise one value: a table, or a text
    .csv .tsv .parquet          a table
    .arrow .ipc .feather        a table
    anything else               a text

Names are read in any case, and ``.gz`` at their end is unpacked.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from llamax.runtime.errors import DataError
from llamax.runtime.units import show_bytes

Row = dict[str, Any]
CHUNK_BYTES = 2**20  # of a file that is cut, at least
BLOCK_BYTES = 2**18  # read from a file at once
MAX_DOCUMENT = 2**26  # bytes of a row, or of a text without a place to cut
MARK = "\ufeff"  # byte order mark
KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".ipc": "arrow",
    ".feather": "arrow",
}
PACKED = (".zst", ".xz", ".bz2", ".lz4", ".zip", ".7z", ".tar", ".tgz")


def kind_of(path: Path) -> str:
    """The kind of table, by the file's name; empty if it is not a table."""
    return KINDS.get(Path(path.name.lower().removesuffix(".gz")).suffix, "")


def refuse_packed(path: Path) -> None:
    """Raise DataError for a file that is packed otherwise than as .gz."""
    name = path.name.lower()
    if name.endswith(PACKED) or name.endswith(".tar.gz"):
        raise DataError(f"{path}: is packed ({path.suffix}); unpack it, or pack its files as .gz")


def is_packed(path: Path) -> bool:
    """Whether a file is to be unpacked while it is read."""
    return path.name.lower().endswith(".gz")


def is_compressed(path: Path) -> bool:
    """Whether a file holds more text than its size says: packed, or Parquet."""
    return is_packed(path) or kind_of(path) == "parquet"


@contextmanager
def reading(path: str | Path) -> Iterator[IO[bytes]]:
    """Yield the bytes of a file, unpacked; DataError if they cannot be read inside the block."""
    path = Path(path)
    try:
        with gzip.open(path) if is_packed(path) else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(str(path), error) from None


def lines_in(file: IO[bytes], path: str, most: int) -> Iterator[bytes]:
    """The lines of a file, each with its end; DataError for one of more than ``most`` bytes."""
    number = 0
    while line := file.readline(most + 1):
        number += 1
        if len(line) > most:
            raise too_long(f"{path}: row {number}", most)
        yield line


def too_long(place: str, most: int) -> DataError:
    """The error for a row that is longer than may be held."""
    return DataError(
        f"{place} has more than {show_bytes(most)}; split it, or use a larger `max_document`"
    )


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
    raise _not_text(raw, place, path, at)


def decoded(file: IO[bytes], path: str) -> Iterator[str]:
    """The text of a file in blocks; errors and the byte order mark as in ``decode``."""
    at, rest = 0, b""
    while block := file.read(BLOCK_BYTES):
        raw = rest + block
        try:
            text, size = codecs.utf_8_decode(raw, "strict", False)
            place = raw.find(b"\0", 0, size)
        except UnicodeDecodeError as error:
            place = error.start
        if place >= 0:
            raise _not_text(raw, place, path, at)
        yield text if at else text.removeprefix(MARK)
        at, rest = at + size, raw[size:]
    if rest:
        raise _not_text(rest, 0, path, at)


def _not_text(raw: bytes, place: int, path: str, at: int) -> DataError:
    return DataError(
        f"{path}: byte {at + place} is not UTF-8 text (0x{raw[place]:02x}); convert the file to "
        "UTF-8, or leave it out"
    )


def unreadable(path: str, error: Exception) -> DataError:
    """The error for a file that the system or a decompressor cannot read."""
    reason = getattr(error, "strerror", None) or error
    return DataError(f"{path}: cannot be read ({reason}); repair it or leave it out")
