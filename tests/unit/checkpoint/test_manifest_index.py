"""The index of a manifest: runs that tile a tensor, and those that meet a run."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from support.tiling import is_tiling

from llamax.checkpoint.manifest_index import NO_RUNS, KindRecord, Runs, near, tiles
from llamax.checkpoint.runs import Run, overlaps


def cut(shape: tuple[int, int], seed: int) -> KindRecord:
    """Random strips of a matrix, each cut into random runs, from files with high numbers."""
    draw, record = random.Random(seed), KindRecord("F32")
    rows, columns = shape
    edges = sorted({0, columns, *(draw.randrange(1, columns) for _ in range(draw.randrange(3)))})
    for left, right in itertools.pairwise(edges):
        size = rows * (right - left)
        stops = sorted({0, size, *(draw.randrange(1, size) for _ in range(4))})
        for start, stop in itertools.pairwise(stops):
            record.add(draw.randrange(10**6), Run(left, right - left, start, stop - start))
    return record


def runs_of(table: Runs) -> list[Run]:
    return [Run(*row[1:]) for row in table.tolist()]


@pytest.mark.parametrize("seed", range(40))
def test_tiling_is_what_single_runs_say(seed: int) -> None:
    table = cut((6, 8), seed).runs
    assert tiles((6, 8), table)
    assert is_tiling((6, 8), runs_of(table))
    assert tiles((6, 2, 4), table)
    draw = random.Random(seed)
    for _ in range(30):
        changed = table.copy()
        row, column = draw.randrange(len(table)), draw.randrange(1, 5)
        changed[row, column] += draw.choice([-9, -1, 1, 8, 2**40])
        numbers = sorted(runs_of(changed), key=lambda run: (run.left, run.width, run.start))
        in_order = runs_of(changed) == numbers
        assert tiles((6, 8), changed) == (in_order and is_tiling((6, 8), numbers))
    for other in ((6, 9), (7, 8), (48,), (8, 6)):
        assert tiles(other, table) == is_tiling(other, runs_of(table))


def test_what_is_no_tiling() -> None:
    one = np.array([[0, 0, 1, 0, 1]])
    assert tiles((), one)
    assert tiles((1,), one)
    assert not tiles((), NO_RUNS)
    assert not tiles((2**40, 2**40), one)
    assert not tiles((1,), np.array([[0, 0, 0, 0, 1]]))
    assert not tiles((1,), np.array([[0, 0, 1, 0, 2**63 - 1]]))
    assert not tiles((1,), np.concatenate([one, one]))


@pytest.mark.parametrize("seed", range(40))
def test_near_misses_no_run_with_common_elements(seed: int) -> None:
    table, wanted = cut((6, 8), seed).runs, cut((6, 8), seed + 1).runs
    for run in runs_of(wanted):
        found = runs_of(near(table, run))
        assert {one for one in runs_of(table) if [*overlaps(one, run)]} <= {*found}
        same_strip = [one for one in found if (one.left, one.width) == (run.left, run.width)]
        assert all([*overlaps(one, run)] for one in same_strip)


def test_a_record_that_is_read_grows_on() -> None:
    record = KindRecord("F32")
    record.add(1, Run(0, 1, 2, 3))
    record.add(0, Run(0, 1, 0, 2))
    assert record.runs.tolist() == [[0, 0, 1, 0, 2], [1, 0, 1, 2, 3]]
    record.add(2, Run(0, 1, 5, 1))
    assert record.runs.tolist() == [[0, 0, 1, 0, 2], [1, 0, 1, 2, 3], [2, 0, 1, 5, 1]]
    assert tiles((6,), record.runs)
