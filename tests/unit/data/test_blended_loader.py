"""Blended datasets: proportions, order, ranks and resuming."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.megatron import DOCUMENTS, write_dataset

from llamax.data.batch_plan import BatchPlan
from llamax.data.blended_loader import PERIOD, BlendedLoader, turns
from llamax.data.dataset import Mixture, open_dataset
from llamax.data.loader import Loader
from llamax.data.megatron import IndexedFile
from llamax.data.shuffle import permute, permute_each
from llamax.runtime.errors import DataError

EIGHT = [2, 5, 3, 1, 6, 7, 0, 4]  # the order of 8 samples that runs of version 0.1.0 have


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("0.5 {d} 0.5", "a weight has no dataset"),
        ("0.5 {d} half {d}", "'half' is not a weight above 0"),
        ("0.5 {d} -1 {d}", "'-1' is not a weight above 0"),
        ("0.5 {d} 0.5 {d}x", "is not a dataset"),
        ("0 {d} 1 {d}x", "'0' is not a weight above 0"),
        ("0.2 {d} 0.3 {d}", "d is there twice, and would give each sample twice; write it once"),
    ],
)
def test_a_blend_that_cannot_be_is_one_line(tmp_path: Path, words: str, said: str) -> None:
    prefix = write_dataset(tmp_path / "d", DOCUMENTS)
    with pytest.raises(DataError) as error:
        open_dataset(words.format(d=prefix))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_blend_opens_its_parts(tmp_path: Path) -> None:
    one, other = (write_dataset(tmp_path / name, DOCUMENTS) for name in "de")
    split = open_dataset(f"3 {one} 1 {other}").train
    assert isinstance(split, Mixture)
    assert split.weights == (3.0, 1.0)
    assert len(split) == 22
    assert split.path == one


# --- blends --------------------------------------------------------------------------------------


def blend(
    tmp_path: Path, weights: list[float], rank: int = 0, of: int = 1, **more: int
) -> BlendedLoader:
    """Parts whose tokens are 1000, 1001, ... and 2000, 2001, ...; samples of 2 tokens."""
    parts, plan = [], BatchPlan(5, 2, 8, 8 // of, rank, of)
    for number, size in ((1, 41), (2, 101)):
        path = tmp_path / f"p{number}"
        if not path.with_name(f"{path.name}.idx").exists():
            write_dataset(path, [list(range(1000 * number, 1000 * number + size))])
        file = IndexedFile(path)
        parts.append(Loader(file, plan, separate_documents=False))
    return BlendedLoader(parts, weights, plan, more.get("consumed", 0))


def test_turns_keep_every_stretch_in_proportion() -> None:
    table = turns([0.7, 0.2, 0.1])
    for stop in (10, 100, 1000, PERIOD):
        counts = np.bincount(table[:stop], minlength=3) / stop
        assert np.abs(counts - [0.7, 0.2, 0.1]).max() * stop < 1.0001


def test_a_blend_takes_each_part_in_its_own_order_without_repeats(tmp_path: Path) -> None:
    mixed = blend(tmp_path, [0.25, 0.75])
    chosen = mixed.order(np.arange(80))
    first = chosen[chosen < 20]  # the first part has 20 samples, and gives 20 of 80
    assert sorted(first.tolist()) == list(range(20))
    second = chosen[chosen >= 20] - 20
    assert len(set(second.tolist()[:50])) == 50  # all of the second before any comes again
    assert first.tolist() == mixed.parts[0].order(np.arange(20)).tolist()


def test_rows_come_from_their_place_in_the_order(tmp_path: Path) -> None:
    mixed = blend(tmp_path, [0.5, 0.5])
    (batch,) = mixed.step()
    chosen = mixed.order(np.arange(8))
    for row, sample in enumerate(chosen.tolist()):
        start = 1000 + 2 * sample if sample < 20 else 2000 + 2 * (sample - 20)
        assert batch.ids[row].tolist() == [start, start + 1]
        assert batch.labels[row].tolist() == [start + 1, start + 2]


def test_a_blend_is_the_same_on_any_number_of_ranks_and_resumes(tmp_path: Path) -> None:
    whole = blend(tmp_path, [0.3, 0.7])
    steps = [whole.step()[0].ids.tolist() for _ in range(5)]
    shares = [blend(tmp_path, [0.3, 0.7], rank, 2) for rank in range(2)]
    for wanted in steps:
        assert [row for share in shares for row in share.step()[0].ids.tolist()] == wanted
    resumed = blend(tmp_path, [0.3, 0.7], consumed=24)
    assert resumed.step()[0].ids.tolist() == steps[3]


def test_periods_follow_each_other(tmp_path: Path) -> None:
    mixed = blend(tmp_path, [0.3, 0.7])
    k = np.arange(PERIOD - 40, PERIOD + 40)
    counts = [int((mixed.order(k) < 20).sum()), 0.3 * 80]
    assert counts[0] == pytest.approx(counts[1], abs=1.5)
    # The n-th sample of a part, over the edge of the period, goes on where it was.
    nth = int((mixed.order(np.arange(PERIOD)) < 20).sum())
    after = mixed.order(np.arange(PERIOD, PERIOD + 40))
    own = mixed.parts[0].order(np.arange(nth, nth + 40))
    assert after[after < 20].tolist() == own[: (after < 20).sum()].tolist()


def test_validation_goes_through_one_part_after_the_other(tmp_path: Path) -> None:
    parts = [
        Loader(
            IndexedFile(write_dataset(tmp_path / f"v{n}", [list(range(9))])),
            BatchPlan(0, 2, 4, 4),
            shuffle=False,
        )
        for n in range(2)
    ]
    mixed = BlendedLoader(parts, [0.9, 0.1], BatchPlan(0, 2, 4, 4))
    assert mixed.order(np.arange(10)).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, -1, -1]
    assert sum(int((batch.labels >= 0).sum()) for (batch,) in mixed.epoch()) == 16


def test_one_call_permutes_places_of_many_datasets() -> None:
    """As one call for each of them; 2**k and its neighbours have networks of other widths."""
    draw = np.random.default_rng(0)
    sizes = np.array([1, 2, 3, 4, 5, 255, 256, 257, 2**20 - 1, 2**20, 2**40 + 1])
    which = draw.integers(0, len(sizes), 400)
    places, seeds, epochs = draw.integers(0, sizes[which]), which % 3, draw.integers(0, 4, 400)
    found = permute_each(places, sizes[which], seeds, epochs)
    cases = zip(places, sizes[which], seeds, epochs, strict=True)
    assert found.tolist() == [int(permute(np.array([p]), *map(int, r))[0]) for p, *r in cases]
    for size in sizes[:8].tolist():
        whole = permute(np.arange(size), size, 2**63 + 1, 5)
        assert sorted(whole.tolist()) == list(range(size))
    assert permute(np.arange(8), 8, 0, 0).tolist() == EIGHT
