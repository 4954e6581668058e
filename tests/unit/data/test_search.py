"""Search in ascending tables, in the order of memory and out of it."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from llamax.data.search import first_at_least, inside


def unaligned(numbers: np.ndarray) -> np.ndarray:
    """A copy that lies two bytes beside where its type wants it, as Megatron's tables do."""
    raw = bytearray(2) + numbers.tobytes()
    table = np.frombuffer(raw, numbers.dtype, len(numbers), 2)
    assert not (table.flags.aligned and len(table))
    return table


@pytest.mark.parametrize("dtype", ["<u8", "<i8"])
@pytest.mark.parametrize("size", [0, 1, 2, 7, 64, 1000])
def test_a_search_finds_what_numpy_finds(dtype: str, size: int) -> None:
    rng = np.random.default_rng(size)
    table = np.sort(rng.integers(0, 500, size)).astype(dtype)
    values = np.append(rng.integers(0, 510, 300), [0, 499, 500, 2**62])
    expected = np.searchsorted(table.astype(np.int64), values)
    for each in (table, unaligned(table)):
        assert first_at_least(each, values).tolist() == expected.tolist()
    starts, stops = values[:100], values[:100] + rng.integers(-3, 40, 100)
    pairs = [
        (row, place)
        for row, (start, stop) in enumerate(zip(starts, stops, strict=True))
        for place in np.flatnonzero((table > start) & (table < stop))
    ]
    rows, places = inside(unaligned(table), starts, stops)
    assert list(zip(rows.tolist(), places.tolist(), strict=True)) == pairs


def test_a_table_out_of_alignment_is_not_copied() -> None:
    table = unaligned(np.arange(10**6))
    tracemalloc.start()
    try:
        assert first_at_least(table, np.array([5, 777_777])).tolist() == [5, 777_777]
        assert tracemalloc.get_traced_memory()[1] < 10**5
    finally:
        tracemalloc.stop()
