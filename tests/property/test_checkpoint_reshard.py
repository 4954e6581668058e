"""Any mesh saves what any mesh loads: A -> B -> A, bit for bit."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import support.checkpoints as worlds
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiling import is_tiling

from llamax.checkpoint import Checkpoint, load_weights
from llamax.checkpoint.runs import Run, overlaps

MESHES = [*itertools.product((1, 2, 4), (1, 2, 4), (1, 0))]


@pytest.mark.parametrize(("tp", "dp", "zero"), MESHES)
@pytest.mark.parametrize(
    ("tied", "kv", "dtype"),
    [(False, 2, torch.float32), (True, 1, torch.bfloat16), (False, 4, torch.bfloat16)],
)
def test_round_trip_is_bit_equal(
    tmp_path: Path, tp: int, dp: int, zero: int, tied: bool, kv: int, dtype: torch.dtype
) -> None:
    model = worlds.llama(tied, kv)
    values = worlds.wholes(model, dtype)
    there = worlds.world(model, tp, dp, zero, values, dtype)
    first = Checkpoint(worlds.save(tmp_path / "a", model, there, zero=zero))
    assert {(n, k) for n in first.names() for k in first.kinds(n)} == set(values)
    for (name, kind), value in values.items():
        assert torch.equal(first.read(name, kind), value)

    # B is a mesh as unlike A as there is
    other = (4 // tp, 4 // dp, 1 - zero)
    elsewhere = worlds.world(model, *other, None, dtype)
    worlds.load(first, elsewhere)
    _assert_equal(elsewhere, worlds.world(model, *other, values, dtype), other[2])

    second = Checkpoint(worlds.save(tmp_path / "b", model, elsewhere, zero=other[2]))
    back = worlds.world(model, tp, dp, zero, None, dtype)
    worlds.load(second, back)
    _assert_equal(back, there, zero)


def _assert_equal(found: list[worlds.Rank], wanted: list[worlds.Rank], zero: int) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        for a, b in zip(mine.owned, theirs.owned, strict=True):
            assert torch.equal(a.tensor, b.tensor), (a.name, a.kind)
        if not zero:
            for kind, shares in theirs.shares.items():
                for name, share in shares.items():
                    assert torch.equal(mine.shares[kind][name], share)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_weights_load_on_their_own(tmp_path: Path, tp: int) -> None:
    model = worlds.llama()
    values = worlds.wholes(model)
    folder = worlds.save(tmp_path, model, worlds.world(model, 2, 2, True, values))
    for rank in worlds.world(model, tp, 1, True, None):
        load_weights(Checkpoint(folder), rank.sharded)
        wanted = worlds.world(model, tp, 1, True, values)[rank.axes.tp.rank].parameters
        for name, value in rank.parameters.items():
            assert torch.equal(value, wanted[name]), name


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, int], list[Run], list[Run]]:
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))

    def tiling() -> list[Run]:
        runs = []
        cuts = draw(st.sets(st.integers(0, columns)))
        edges = sorted({0, columns} | cuts)
        for left, right in itertools.pairwise(edges):
            size = rows * (right - left)
            ends = sorted({0, size} | draw(st.sets(st.integers(0, size), max_size=4)))
            for start, stop in itertools.pairwise(ends):
                runs.append(Run(left, right - left, start, stop - start))
        return runs

    return (rows, columns), tiling(), tiling()


def _elements(values: torch.Tensor, run: Run) -> torch.Tensor:
    return values[:, run.left : run.left + run.width].reshape(-1)[run.start : run.stop]


@given(tilings())
def test_runs_reshard_into_any_other_runs(
    drawn: tuple[tuple[int, int], list[Run], list[Run]],
) -> None:
    shape, sources, targets = drawn
    assert is_tiling(shape, sources)
    values = torch.arange(shape[0] * shape[1]).view(shape)
    for target in targets:
        into = torch.full((target.length,), -1)
        for source in sources:
            stored = _elements(values, source)
            for copy in overlaps(source, target):
                for row in range(copy.rows):
                    here = copy.target + row * copy.target_stride
                    there = copy.source + row * copy.source_stride
                    assert (into[here : here + copy.columns] == -1).all(), "copied twice"
                    into[here : here + copy.columns] = stored[there : there + copy.columns]
        assert torch.equal(into, _elements(values, target))


@given(tilings(), st.data())
def test_a_tiling_with_a_run_missing_or_repeated_is_refused(
    drawn: tuple[tuple[int, int], list[Run], list[Run]], data: st.DataObject
) -> None:
    shape, runs, _ = drawn
    run = data.draw(st.sampled_from(runs))
    assert not is_tiling(shape, [other for other in runs if other is not run])
    assert not is_tiling(shape, [*runs, run])
