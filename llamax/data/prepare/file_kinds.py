"""What kind of file something is, by its name and, for .json, by its beginning.

One place decides for text and for rows, and for every command::

    .jsonl .ndjson .jsonlines   an object a line: rows
    .json                       an object a line: rows; otherwise one value: a table, or a text
    .csv .tsv .parquet          a table
    anything else               a text

Names are read in any case, and ``.gz`` at their end is unpacked.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import IO, Any

from llamax.runtime.errors import DataError
from llamax.runtime.json_reader import JsonError, parse_json

Row = dict[str, Any]
CHUNK_BYTES = 2**20  # of a file that is cut, at least
MARK = "\ufeff"  # byte order mark
KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
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


def open_file(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked."""
    return gzip.open(path) if is_packed(path) else path.open("rb")  # type: ignore[return-value]


def has_row_per_line(path: Path, key: str = "") -> bool:
    """Whether a .json file has an object per line, as JSONL has.

    An only line is a row if it has ``key``; without one, if it does not hold one list of rows.
    """
    try:
        with open_file(path) as file:
            lines = [
                line for line, _ in zip((line for line in file if line.strip()), "ab", strict=False)
            ]
        first = parse_json(lines[0].removeprefix(MARK.encode()), False) if lines else None
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(str(path), error) from None
    except JsonError:
        return False
    if not isinstance(first, dict) or len(lines) > 1:
        return isinstance(first, dict)
    return key in first if key else not one_list(first)


def one_list(table: Row) -> list[Any] | None:
    """The only list among the values of a JSON object; None if there is none, or if it is a row."""
    if "messages" in table or "conversations" in table:
        return None
    lists = [value for value in table.values() if isinstance(value, list)]
    return lists[0] if len(lists) == 1 else None


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
