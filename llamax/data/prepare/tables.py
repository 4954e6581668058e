"""Rows of JSONL, JSON, CSV and Parquet files, cut into ranges that workers read in parallel.

``plan_tables`` reads each file once, only to find where rows begin and how many there are, so a
slice of the rows (``train[:10%]``, a limit) is exact and a mistake can name its row::

    rows.jsonl   row 1  row 2  row 3 | row 4  row 5        ranges of about CHUNK_BYTES, each
    rows.csv     head | row 1  "row                        beginning where a row begins; a quoted
                 2" | row 3                                line break is inside its row

A CSV is separated by commas, or by semicolons, tabs or bars if its head has no comma.  A byte order
mark at the start of a file is skipped.

A name that is not a file is looked up on the Hugging Face Hub with ``datasets``, and its rows are
kept as JSONL beside the parts.  Local JSONL, JSON and CSV need only Python.
"""

from __future__ import annotations

import csv
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from llamax.data.prepare import file_kinds
from llamax.data.prepare.file_kinds import (
    Row,
    decode,
    has_row_per_line,
    is_packed,
    kind_of,
    one_list,
    open_file,
    refuse_packed,
    unreadable,
)
from llamax.runtime.errors import DataError
from llamax.runtime.files import new_file
from llamax.runtime.json_reader import JsonError, parse_json

DELIMITERS = {"csv": ",", "tsv": "\t", "csv;": ";", "csv\t": "\t", "csv|": "|"}
SLICE = re.compile(r"(\w+)(?:\[(?:(-?\d+)(%?))?:(?:(-?\d+)(%?))?\])?")
HUB = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class RowRange:
    """Rows ``first`` to ``first + count`` (from 0) of a file.

    They lie in its bytes start:stop (in row groups, for Parquet), after ``skip`` rows that do not
    belong to the range.  ``version`` changes when the file does.
    """

    path: str
    kind: str
    start: int
    stop: int
    first: int
    count: int
    version: str
    skip: int = 0

    @property
    def size_bytes(self) -> int:
        """Bytes of the range; of row groups, whose size is not known, none."""
        return 0 if self.kind == "parquet" else self.stop - self.start

    def slice(self, start: int, stop: int) -> RowRange | None:
        """The rows of this range that are among rows start:stop of the file; None if none are."""
        low, high = max(self.first, start), min(self.first + self.count, stop)
        if low >= high:
            return None
        return replace(self, first=low, count=high - low, skip=self.skip + low - self.first)


def plan_tables(
    inputs: Sequence[str],
    split: str = "",
    limit: int = 0,
    scratch: Path = Path(),
    left: list[str] | None = None,
) -> list[RowRange]:
    """The ranges of rows of all inputs, in the order given; the files of a folder are sorted.

    ``split``: a name and perhaps a slice of all rows (``train[:10%]``); in a folder it chooses
    files by name.  ``limit``: the number of rows to take; 0: all.  ``scratch``: folder for rows
    from the Hub; ``left``: receives the files of folders that are not taken.  Raises DataError for
    an input that is missing or cannot be read, and if no row is left.
    """
    name, bounds = parse_split(split)
    ranges: list[RowRange] = []
    for source in inputs:
        path = Path(source)
        if path.is_dir():
            files = [
                each
                for each in sorted(path.rglob("*"))
                if each.is_file() and not any(p[0] == "." for p in each.relative_to(path).parts)
            ]
            paths = [each for each in files if kind_of(each)]
            chosen = [each for each in paths if name in each.name.split(".")[0]] if name else paths
            if left is not None:
                left += [str(each) for each in files if each not in chosen]
            if not chosen:
                found = ", ".join(each.name for each in paths[:8]) or "none"
                raise DataError(
                    f"{path}: holds no rows{f' of split {name}' if name else ''} (files with rows: "
                    f"{found}); give JSONL, JSON, CSV or Parquet"
                )
        elif path.is_file():
            refuse_packed(path)
            if not kind_of(path):
                raise DataError(
                    f"{path}: is not a table of rows; give a .jsonl, .json, .csv, .tsv or .parquet"
                )
            chosen = [path]
        elif is_hub_name(source):
            chosen = [from_hub(source, name or "train", scratch)]
        else:
            raise DataError(f"{path}: no such file or folder; check the path")
        for table in chosen:
            ranges += scan(table)
    total = sum(rows.count for rows in ranges)
    start, stop = bounds(total)
    stop = min(stop, start + limit) if limit else stop
    kept, before = [], 0
    for rows in ranges:
        offset = rows.first - before
        part = rows.slice(start + offset, stop + offset)
        before += rows.count
        if part is not None:
            kept.append(part)
    if not kept:
        raise DataError(
            f"{', '.join(inputs)}: {split or 'this'} leaves no row of {total}; choose other rows"
        )
    return kept


def is_hub_name(source: str) -> bool:
    """Whether an input looks like the name of a dataset on the Hugging Face Hub."""
    return bool(HUB.fullmatch(source)) and not source.startswith(".") and not Path(source).exists()


def parse_split(text: str) -> tuple[str, Callable[[int], tuple[int, int]]]:
    """The name in ``train[:10%]``, and a function from the number of rows to the slice's bounds."""
    match = SLICE.fullmatch(text) if text else None
    if text and match is None:
        raise DataError(
            f"`split={text}` is not understood; write a name and perhaps a slice: train, "
            "train[:10%], train[100:200]"
        )

    def at(number: str | None, percent: str | None, rows: int, absent: int) -> int:
        if number is None:
            return absent
        place = round(rows * int(number) / 100) if percent else int(number)
        return min(max(place + rows if place < 0 else place, 0), rows)

    def bounds(rows: int) -> tuple[int, int]:
        if match is None:
            return 0, rows
        _, low, low_percent, high, high_percent = match.groups()
        return at(low, low_percent, rows, 0), at(high, high_percent, rows, rows)

    return match[1] if match else "", bounds


def from_hub(name: str, split: str, scratch: Path) -> Path:
    """Download the rows of a Hub dataset into a JSONL file; DataError if that fails."""
    try:
        import datasets  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        raise DataError(
            f"{name} is not a file, and the Hugging Face Hub needs the package datasets, which is "
            "not installed; pip install 'llamax[hub]', or give local files"
        ) from None
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the network, the Hub and every builder raise what they like
        raise DataError(
            f"{name} is not a file, and cannot be read from the Hugging Face Hub "
            f"({' '.join(str(error).split())[:160]}); give local files"
        ) from None
    path = scratch / f"{name.replace('/', '--')}-{split}-{rows._fingerprint}.jsonl"
    if not path.exists():
        partial = path.with_suffix(".partial")
        with open(partial, "w", encoding="utf-8", opener=new_file) as file:
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        partial.replace(path)
    return path


# ---- where rows begin


def scan(path: Path) -> Iterator[RowRange]:
    """The runs of one file."""
    kind, stat = kind_of(path), path.stat()
    version = f"{stat.st_size}-{stat.st_mtime_ns}"
    if kind == "json":
        kind = "jsonl" if has_row_per_line(path) else kind
    if kind == "parquet":
        about, first = _parquet(path).metadata, 0
        for group in range(about.num_row_groups):
            count = about.row_group(group).num_rows
            yield RowRange(str(path), kind, group, group + 1, first, count, version)
            first += count
        return
    if kind == "json":
        yield RowRange(str(path), kind, 0, stat.st_size, 0, len(json_rows(path)), version)
        return
    whole = is_packed(path)  # reading on from the middle would unpack all before it
    start = stop = first = count = 0
    try:
        if kind == "csv":
            kind += _separator(path)
        with open_file(path) as file:
            edges = _edges(file, kind)
            if kind != "jsonl":
                _, start = next(edges, (0, 0))
            for begin, end in edges:
                if count and begin - start >= file_kinds.CHUNK_BYTES and not whole:
                    yield RowRange(str(path), kind, start, begin, first, count, version)
                    start, first, count = begin, first + count, 0
                count, stop = count + 1, end
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(str(path), error) from None
    except csv.Error as error:
        raise DataError(
            f"{path}: row {first + count + 1} is not CSV ({error}); correct its quotes"
        ) from None
    if count:
        yield RowRange(str(path), kind, start, stop, first, count, version)


def _edges(file: IO[bytes], kind: str) -> Iterator[tuple[int, int]]:
    """(begin, stop) of each row in bytes, the head of a CSV too; blank lines are skipped."""
    at = begin = 0

    def lines() -> Iterator[str]:
        nonlocal at
        for line in file:
            at += len(line)
            yield line.decode("latin-1")  # only commas, quotes and ends of lines matter here

    if kind == "jsonl":
        for line in lines():
            if line.strip():
                yield at - len(line), at
        return
    csv.field_size_limit(2**31 - 1)
    for fields in csv.reader(lines(), delimiter=DELIMITERS[kind], strict=True):
        if fields:
            yield begin, at
        begin = at


def _separator(path: Path) -> str:
    """The separator in the head of a CSV if it is not a comma; otherwise empty."""
    with open_file(path) as file:
        head = next((line for line in file if line.strip()), b"")
    return "" if b"," in head else next((mark for mark in ";\t|" if mark.encode() in head), "")


# ---- the rows


def read_rows(rows: RowRange) -> Iterator[tuple[str, Row]]:
    """(place for messages, row) of each row of a range; DataError names the place of a mistake."""
    reader = {"jsonl": _lines, "json": _array, "parquet": _groups}.get(rows.kind, _csv)
    try:
        for number, row in enumerate(reader(rows)):
            if number >= rows.skip + rows.count:
                return
            if number >= rows.skip:
                place = f"{rows.path}: row {rows.first + number - rows.skip + 1}"
                if isinstance(row, DataError):
                    raise DataError(f"{place}: {row}")
                if not isinstance(row, dict):
                    raise DataError(f"{place}: is {type(row).__name__}, not an object; correct it")
                yield place, row
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(rows.path, error) from None


def _lines(rows: RowRange) -> Iterator[Any]:
    with open_file(Path(rows.path)) as file:
        file.seek(rows.start)
        at = rows.start
        for line in file:
            if line.strip():
                try:
                    yield parse_json(decode(line, rows.path, at), False)
                except JsonError as error:
                    yield DataError(f"{error}; correct or remove it")
            at += len(line)


def _array(rows: RowRange) -> Iterator[Any]:
    yield from json_rows(Path(rows.path))


def _csv(rows: RowRange) -> Iterator[Any]:
    csv.field_size_limit(2**31 - 1)
    delimiter = DELIMITERS[rows.kind]

    def records(raw: bytes, start: int) -> Iterator[list[str]]:
        text = decode(raw, rows.path, start)
        yield from csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)

    with open_file(Path(rows.path)) as file:
        begin, stop = next(_edges(file, rows.kind))
        file.seek(begin)
        head = next(records(file.read(stop - begin), begin))
        if twice := [name for number, name in enumerate(head) if name in head[:number]]:
            yield DataError(f"has a head that names {twice[0]!r} twice; rename one of them")
            return
        file.seek(rows.start)
        body = file.read(rows.stop - rows.start)
    for fields in records(body, rows.start):
        if len(fields) == len(head):
            yield dict(zip(head, fields, strict=True))
        elif fields:
            yield DataError(
                f"has {len(fields)} fields where the head names {len(head)} "
                f"({', '.join(head)[:80]}); correct its commas and quotes"
            )


def _groups(rows: RowRange) -> Iterator[Any]:
    yield from _parquet(Path(rows.path)).read_row_group(rows.start).to_pylist()


def _parquet(path: Path) -> Any:
    try:
        import pyarrow  # type: ignore[import-untyped, import-not-found, unused-ignore]
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            f"{path}: Parquet needs the package pyarrow, which is not installed; pip install "
            "'llamax[parquet]', or give JSONL or CSV"
        ) from None
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: is not Parquet ({' '.join(str(error).split())[:120]})") from None


def json_rows(path: Path) -> list[Any]:
    """The rows of a JSON file: a list, or an object that holds one list."""
    try:
        with open_file(path) as file:
            found = parse_json(decode(file.read(), str(path), 0), False)
    except JsonError as error:
        raise DataError(f"{path}: {error}; correct it") from None
    if isinstance(found, dict):
        found = one_list(found)
    if not isinstance(found, list):
        raise DataError(f"{path}: is neither a list of rows nor an object with one; use JSONL")
    return found
