"""What kind of file something is, by its name and, for .json, by its beginning.

One place decides for text and for rows, and for every command::

    .jsonl .ndjson .jsonlines   an object a line: rows
    .json                       an object a line: rows; otherwise one value: a table, or a text
    .csv .tsv .parquet          a table
    .arrow .ipc .feather        a table
    anything else               a text

Names are read in any case, and ``.gz``, ``.bz2``, ``.xz`` or ``.zst`` at their end is unpacked.
"""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from llamax.data.prepare.unpack import BLOCK_BYTES, UNPACK, check_decoder, open_packed
from llamax.runtime.errors import DataError
from llamax.runtime.units import show_bytes

Row = dict[str, Any]
CHUNK_BYTES = 2**20  # of a file that is cut, at least
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
UNPACKED = (".gz", *UNPACK)  # while a file is read
REFUSED = (".lz4", ".zip", ".7z", ".rar", ".tar", ".tgz", ".tbz2", ".txz", ".tzst")


def _name_in(path: Path) -> tuple[str, str]:
    """A file's name in lower case without the ending of a packed one, and that ending, or none."""
    name = path.name.lower()
    ending = next(filter(name.endswith, UNPACKED), "")
    return name.removesuffix(ending), ending


def kind_of(path: Path) -> str:
    """The kind of table, by the file's name; empty if it is not a table."""
    return KINDS.get(Path(_name_in(path)[0]).suffix, "")


def refuse_packed(path: Path) -> None:
    """Raise DataError for a file that is packed in a way that is not unpacked here."""
    name, ending = _name_in(path)
    if name.endswith(REFUSED):
        raise DataError(
            f"{path}: is packed ({Path(name).suffix}{ending}); unpack it, or pack its files as "
            f"{', '.join(UNPACKED[:-1])} or {UNPACKED[-1]}"
        )
    check_decoder(path, ending)


def without_packing(path: Path) -> Path:
    """The path of a file without the ending that says how it is packed."""
    ending = _name_in(path)[1]
    return path.with_name(path.name[: len(path.name) - len(ending)])


def is_packed(path: Path) -> bool:
    """Whether a file is to be unpacked while it is read."""
    return bool(_name_in(path)[1])


def is_compressed(path: Path) -> bool:
    """Whether a file holds more text than its size says: packed, or Parquet."""
    return is_packed(path) or kind_of(path) == "parquet"


@contextmanager
def reading(path: str | Path) -> Iterator[IO[bytes]]:
    """Yield the bytes of a file, unpacked; DataError if they cannot be read inside the block."""
    path = Path(path)
    try:
        ending = _name_in(path)[1]
        with open_packed(path, ending) if ending else path.open("rb") as file:
            yield file
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
