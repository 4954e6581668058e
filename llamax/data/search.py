"""Search in ascending tables of mapped files, which reads only the places that it visits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from llamax.data.shuffle import Integers


def inside(table: npt.NDArray[Any], starts: Integers, stops: Integers) -> tuple[Integers, Integers]:
    """Where a table has numbers above ``starts[i]`` and below ``stops[i]``: (i, place) of each."""
    low, high = first_at_least(table, starts + 1), first_at_least(table, stops)
    counts = np.maximum(high - low, 0)
    rows = np.repeat(np.arange(len(starts)), counts)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows, low[rows] + within


def first_at_least(table: npt.NDArray[Any], values: Integers) -> Integers:
    """The first place with a number of at least each value, or the length of the table."""
    if table.flags.aligned:  # np.searchsorted would copy any other table
        return np.searchsorted(table, values.astype(table.dtype))
    low, high = np.zeros_like(values), np.full_like(values, len(table))
    while (left := np.flatnonzero(low < high)).size:
        middle = (low[left] + high[left]) // 2
        below = table[middle].astype(np.int64) < values[left]
        low[left] = np.where(below, middle + 1, low[left])
        high[left] = np.where(below, high[left], middle)
    return low
