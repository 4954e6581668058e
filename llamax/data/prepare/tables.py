"""Rows of JSONL, JSON, CSV, Parquet and Arrow files, cut into ranges that workers read in parallel.

``plan_tables`` reads each file once, only to find where rows begin and how many there are, so a
slice of the rows (``train[:10%]``, a limit) is exact and a mistake can name its row::

    rows.jsonl   row 1  row 2  row 3 | row 4  row 5        ranges of about CHUNK_BYTES, each
    rows.csv     head | row 1  "row                        beginning where a row begins; a quoted
                 2" | row 3                                line break is inside its row

A CSV is separated by commas, or by semicolons, tabs or bars if its head has no comma.  A byte order
mark at the start of a file is skipped.

Of a name on the Hugging Face Hub the files are downloaded: ``hub_dataset``.  JSONL, JSON and CSV
need only Python.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from llamax.data.prepare import file_kinds
from llamax.data.prepare.arrow_tables import arrow_ranges, arrow_rows, parquet_ranges, parquet_rows
from llamax.data.prepare.file_kinds import (
    MARK,
    MAX_DOCUMENT,
    Row,
    decode,
    is_packed,
    kind_of,
    lines_in,
    reading,
    refuse_packed,
    too_long,
)
from llamax.data.prepare.folder_warnings import warn_of_files
from llamax.data.prepare.hub_dataset import dataset_on_hub
from llamax.data.prepare.json_stream import json_rows, list_key, top_level_keys
from llamax.data.prepare.row_range import RowRange
from llamax.data.prepare.saved_dataset import files_of_split, is_saved
from llamax.runtime.errors import DataError
from llamax.runtime.hub_name import hub_name
from llamax.runtime.json_reader import JsonError, parse_json

DELIMITERS = {"csv": ",", "tsv": "\t", "csv;": ";", "csv\t": "\t", "csv|": "|"}
SLICE = re.compile(r"(\w+)(?:\[(?:(-?\d+)(%?))?:(?:(-?\d+)(%?))?\])?")


def plan_tables(
    inputs: Sequence[str],
    split: str = "",
    limit: int = 0,
    left: list[str] | None = None,
    most: int = MAX_DOCUMENT,
) -> list[RowRange]:
    """The ranges of rows of all inputs, in the order given; the files of a folder are sorted.

    ``split``: a name and perhaps a slice of all rows (``train[:10%]``); in a folder it chooses
    files by name.  ``limit``: the number of rows to take; 0: all.  ``left`` receives the
    files of folders that are not taken; ``most``: bytes of the longest row.  Raises DataError for
    an input that is missing or cannot be read, and if no row is left.
    """
    name, bounds = parse_split(split)
    ranges: list[RowRange] = []
    for source in inputs:
        for table in _files_of(source, name, left):
            ranges += scan(table, most)
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


def _files_of(source: str, name: str, left: list[str] | None) -> list[Path]:
    """The files of rows of an input: those of the split ``name``, or all where it is empty."""
    path = Path(source)
    if path.is_dir():
        return files_of_split(path, name, left) if is_saved(path) else _files_in(path, name, left)
    if path.is_file():
        refuse_packed(path)
        if not kind_of(path):
            raise DataError(
                f"{path}: is not a table of rows; give a .jsonl, .json, .csv, .tsv, .parquet or "
                ".arrow"
            )
        if name not in ("", "train") and name not in path.name:
            raise DataError(
                f"{path}: is one file, without a split {name}; leave the name out, or give a "
                "folder or a Hub dataset with splits"
            )
        return [path]
    if (on_hub := hub_name(source, "dataset")) is not None:
        return dataset_on_hub(on_hub, name)[name or "train"]
    raise DataError(f"{path}: no such file or folder; check the path")


def _files_in(folder: Path, name: str, left: list[str] | None) -> list[Path]:
    """The files of rows at any depth of a folder, those with ``name`` in their names, sorted."""
    files = [
        each
        for each in sorted(folder.rglob("*"))
        if each.is_file() and not any(p[0] == "." for p in each.relative_to(folder).parts)
    ]
    if saved := next((each.parent for each in files if is_saved(each.parent)), None):
        raise DataError(f"{folder}: holds the saved dataset {saved}; give that folder")
    tables = [each for each in files if kind_of(each)]
    chosen = [each for each in tables if name in each.name.split(".")[0]]
    if not chosen:
        found = ", ".join(each.name for each in tables[:8]) or "none"
        raise DataError(
            f"{folder}: holds no rows{f' of split {name}' if name else ''} (files with rows: "
            f"{found}); give JSONL, JSON, CSV or Parquet"
        )
    if not name:
        warn_of_files(folder, chosen)
    if left is not None:
        taken = {*chosen}
        left += [str(each) for each in files if each not in taken]
    return chosen


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


# ---- where rows begin


def scan(path: Path, most: int = MAX_DOCUMENT) -> Iterator[RowRange]:
    """The runs of one file; DataError for a row of more than ``most`` bytes."""
    kind, stat = kind_of(path), path.stat()
    version = f"{stat.st_size}-{stat.st_mtime_ns}"
    if kind == "json":
        kind = "jsonl" if has_row_per_line(path, "", most) else kind
    if kind in ("parquet", "arrow"):
        ranges = parquet_ranges if kind == "parquet" else arrow_ranges
        yield from ranges(path, version)
        return
    if kind == "json":
        rows = sum(1 for _ in json_rows(path, most))
        yield RowRange(str(path), kind, 0, stat.st_size, 0, rows, version)
        return
    whole = is_packed(path)  # reading on from the middle would unpack all before it
    start = stop = first = count = 0
    try:
        if kind == "csv":
            kind += _separator(path, most)
        with reading(path) as file:
            edges = _edges(file, kind, str(path), most)
            if kind != "jsonl":
                _, start = next(edges, (0, 0))
            for begin, end in edges:
                if count and begin - start >= file_kinds.CHUNK_BYTES and not whole:
                    yield RowRange(str(path), kind, start, begin, first, count, version)
                    start, first, count = begin, first + count, 0
                count, stop = count + 1, end
    except csv.Error as error:
        raise DataError(
            f"{path}: row {first + count + 1} is not CSV ({error}); correct its quotes"
        ) from None
    if count:
        yield RowRange(str(path), kind, start, stop, first, count, version)


def _edges(file: IO[bytes], kind: str, path: str, most: int) -> Iterator[tuple[int, int]]:
    """(begin, stop) of each row in bytes, the head of a CSV too; blank lines are skipped."""
    at = begin = number = 0

    def lines() -> Iterator[str]:
        nonlocal at
        for line in lines_in(file, path, most):
            at += len(line)
            if at - begin > most and kind != "jsonl":
                raise too_long(f"{path}: row {number}", most)
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
            number += 1
        begin = at


def has_row_per_line(path: Path, key: str = "", most: int = MAX_DOCUMENT) -> bool:
    """Whether a .json file has an object per line, as JSONL has.

    An only line is a row if it has ``key``; without one, if it does not hold one list of rows.
    """
    first = second = b""
    with reading(path) as file:
        while not second and (line := file.readline(most + 1)):
            if line.strip():
                first, second = (first, line) if first else (line, b"")
    first = first.removeprefix(MARK.encode())
    if not first.lstrip().startswith(b"{"):
        return False
    if second and len(first) <= most:
        try:
            return isinstance(parse_json(first, False), dict)
        except JsonError:
            return False
    try:
        keys = top_level_keys(path, most)
    except DataError:
        if len(first) > most:
            raise
        return False
    return key in keys if key else list_key(keys) is None


def _separator(path: Path, most: int) -> str:
    """The separator in the head of a CSV if it is not a comma; otherwise empty."""
    with reading(path) as file:
        while (head := file.readline(most)) and not head.strip():
            pass
    return "" if b"," in head else next((mark for mark in ";\t|" if mark.encode() in head), "")


# ---- the rows


def read_rows(rows: RowRange, most: int = MAX_DOCUMENT) -> Iterator[tuple[str, Row]]:
    """(place for messages, row) of each row of a range; DataError names the place of a mistake.

    ``most``: bytes of the longest row.
    """
    reader = {
        "jsonl": _lines,
        "json": _array,
        "parquet": parquet_rows,
        "arrow": arrow_rows,
    }.get(rows.kind, _csv)
    for number, row in enumerate(reader(rows, most)):
        if number >= rows.skip + rows.count:
            return
        if number >= rows.skip:
            place = f"{rows.path}: row {rows.first + number - rows.skip + 1}"
            if isinstance(row, DataError):
                raise DataError(f"{place}: {row}")
            if not isinstance(row, dict):
                raise DataError(f"{place}: is {type(row).__name__}, not an object; correct it")
            yield place, row


def _lines(rows: RowRange, most: int) -> Iterator[Any]:
    with reading(rows.path) as file:
        file.seek(rows.start)
        at = rows.start
        for line in lines_in(file, rows.path, most):
            if line.strip():
                try:
                    yield parse_json(decode(line, rows.path, at), False)
                except JsonError as error:
                    yield DataError(f"{error}; correct or remove it")
            at += len(line)


def _array(rows: RowRange, most: int) -> Iterator[Any]:
    yield from json_rows(Path(rows.path), most)


def _csv(rows: RowRange, most: int) -> Iterator[Any]:
    csv.field_size_limit(2**31 - 1)
    delimiter = DELIMITERS[rows.kind]
    with reading(rows.path) as file:

        def records(start: int, stop: int) -> Iterator[list[str]]:
            def lines() -> Iterator[str]:
                at = start
                while at < stop and (line := file.readline(most + 1)):
                    yield decode(line, rows.path, at)
                    at += len(line)

            file.seek(start)
            yield from csv.reader(lines(), delimiter=delimiter)

        begin, stop = next(_edges(file, rows.kind, rows.path, most))
        head = next(records(begin, stop))
        if twice := [name for name, times in Counter(head).items() if times > 1]:
            yield DataError(f"has a head that names {twice[0][:80]!r} twice; rename one of them")
            return
        for fields in records(rows.start, rows.stop):
            if len(fields) == len(head):
                yield dict(zip(head, fields, strict=True))
            elif fields:
                yield DataError(
                    f"has {len(fields)} fields where the head names {len(head)} "
                    f"({', '.join(head)[:80]}); correct its commas and quotes"
                )
