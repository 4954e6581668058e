"""The numbers of a log as columns: parsed in blocks, eight bytes each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic_core import from_json

from llamax.runtime.errors import DataError
from llamax.runtime.files import plain_file
from llamax.training.metrics import ANY_NUMBER, OWN, SKIPPED, WHOLE, Record, is_ids, is_own

BLOCK_BYTES = 2**21
NAN = float("nan")
OPTIONAL = {  # where a record has none
    "mfu": 0.0,
    "validation_loss": NAN,
    "loss_scale": NAN,
    "overflowed_steps": NAN,
    SKIPPED: NAN,
    OWN: NAN,
    "rewinds": NAN,
}
NAMES = frozenset(Record.__dataclass_fields__)
Numbers = npt.NDArray[np.float64]


def read_columns(path: Path, names: Sequence[str]) -> dict[str, Numbers]:
    """The fields ``names`` of all records of a log; a last line cut short is left out.

    Raises DataError where another line is not a record.
    """
    parts: dict[str, list[Numbers]] = {name: [np.zeros(0)] for name in names}
    for block, lines_before, is_last in _blocks(path):
        lines = block.splitlines()
        try:
            columns = _parse(lines, names)
        except (ValueError, TypeError, KeyError, OverflowError):
            records = _records(path, lines, lines_before, is_last)
            columns = {name: _column(records, name) for name in names}
        for name, column in columns.items():
            parts[name].append(column)
    return {name: np.concatenate(columns) for name, columns in parts.items()}


def _blocks(path: Path) -> Iterator[tuple[bytes, int, bool]]:
    """Blocks of whole lines, the number of lines before each, and whether it is the last."""
    if not path.exists():
        return
    with open(path, "rb", opener=plain_file) as file:
        lines, block = 0, file.read(BLOCK_BYTES) + file.readline(BLOCK_BYTES)
        while block:
            following = file.read(BLOCK_BYTES) + file.readline(BLOCK_BYTES)
            yield block, lines, not following
            lines, block = lines + len(block.splitlines()), following


def _parse(lines: Sequence[bytes], names: Sequence[str]) -> dict[str, Numbers]:
    """The columns of lines; ValueError, TypeError, KeyError or OverflowError for a strange line."""
    values: list[dict[str, Any]] = [from_json(line) for line in lines]
    fields = {*map(tuple, values)}
    if set(map(type, values)) - {dict} or not all(
        NAMES - {*OPTIONAL} <= set(found) <= NAMES for found in fields
    ):
        raise ValueError("not the fields of a record")
    if not all(is_ids(found[SKIPPED]) for found in values if SKIPPED in found):
        raise ValueError("not the samples of a skipped step")
    if not all(is_own(found[OWN]) for found in values if OWN in found):
        raise ValueError("not numbers of a program's own")
    columns = {}
    for name in names:
        if all(name in found for found in fields):
            column = [*map(itemgetter(name), values)]
        else:
            column = [value.get(name, OPTIONAL[name]) for value in values]
        if not {*map(type, column)} <= ({int} if name in WHOLE else {int, float}):
            raise TypeError(f"{name} is not a number of a record")
        columns[name] = np.array(column, np.float64)
        if name not in ANY_NUMBER and not ((columns[name] >= 0) & (columns[name] < 2.0**63)).all():
            raise ValueError(f"{name} is out of range")
    return columns


def _records(path: Path, lines: list[bytes], before: int, is_last: bool) -> list[Record]:
    """The records of lines, but a last one that was cut short; DataError for any other line."""
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(Record.from_json(line))
        except (ValueError, TypeError, OverflowError):
            if is_last and number == len(lines):
                break
            raise DataError(f"{path}:{before + number}: not a record; remove this line") from None
    return records


def _column(records: Sequence[Record], name: str) -> Numbers:
    values = (getattr(record, name) for record in records)
    return np.array([NAN if value is None else value for value in values], np.float64)
