"""Packing: which documents share a sample."""

from __future__ import annotations

import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.token_files import write_token_file

from llamax.data import packing
from llamax.data.packing import Packs, best_fit
from llamax.data.token_file import TokenFile
from llamax.runtime.errors import DataError


def packed(sizes: list[int], room: int) -> list[list[int]]:
    """The samples of ``best_fit`` as lists of documents."""
    order, counts = best_fit(np.array(sizes, np.int64), room)
    return [part.tolist() for part in np.split(order, np.cumsum(counts))[:-1]]


def one_by_one(sizes: list[int], room: int) -> list[list[int]]:
    """Best fit, document by document: into the sample with the least room that is enough.

    Of samples with equal room the one comes first that reached it last.
    """
    samples: list[list[int]] = []
    free: list[tuple[int, int]] = []  # room of each sample, and when it came to have it
    for number, size in enumerate(sizes):
        fitting = [k for k in range(len(samples)) if free[k][0] >= size]
        if not fitting:
            fitting.append(len(samples))
            samples.append([])
            free.append((room, number))
        chosen = min(fitting, key=lambda k: (free[k][0], -free[k][1]))
        samples[chosen].append(number)
        free[chosen] = (free[chosen][0] - size, number)
    return samples


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 70))
def test_best_fit_is_that_of_document_by_document(sizes: list[int], room: int) -> None:
    sizes = sorted(sizes, reverse=True)
    assert packed(sizes, room) == one_by_one(sizes, room)


@pytest.mark.parametrize("largest", [3, 12, 64])
def test_best_fit_of_many_documents_of_few_sizes(largest: int) -> None:
    sizes = sorted(np.random.default_rng(largest).integers(1, largest, 900), reverse=True)
    assert packed(sizes, 64) == one_by_one(sizes, 64)


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 70))
def test_best_fit_places_every_document_once(sizes: list[int], room: int) -> None:
    sizes = sorted(sizes, reverse=True)
    samples = packed(sizes, room)
    assert sorted(i for sample in samples for i in sample) == list(range(len(sizes)))
    filled = [sum(sizes[i] for i in sample) for sample in samples]
    assert all(total <= room for total in filled)
    lowest = -(-sum(sizes) // room)
    assert len(samples) <= 11 / 9 * lowest + 1 + len(sizes) * (max(sizes, default=0) > room // 2)


def test_best_fit_takes_the_fullest_that_fits() -> None:
    assert packed([7, 6, 3, 3, 1], 10) == [[0, 2], [1, 3, 4]]
    assert packed([10, 9, 1], 10) == [[0], [1, 2]]
    assert packed([], 10) == []


def test_windows_bound_the_work_and_every_document_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "WINDOW", 64)
    lengths = np.random.default_rng(0).integers(2, 40, 500).tolist()
    file = write_token_file(tmp_path / "f.tokens", lengths)
    packs = Packs(file, 64)
    members = np.concatenate([packs.documents(i) for i in range(len(packs))])
    assert sorted(members.tolist()) == list(range(500))
    assert packs.places == sum(lengths) - 500
    assert packs.fill == packs.places / (64 * len(packs)) > 0.9
    again, other = Packs(file, 64), Packs(file, 64, seed=1)
    assert all((again.documents(i) == packs.documents(i)).all() for i in range(len(packs)))
    assert any((other.documents(i)[:1] != packs.documents(i)[:1]).any() for i in range(len(other)))


def test_long_documents_are_counted_and_cut_as_configured(tmp_path: Path) -> None:
    file = write_token_file(tmp_path / "f.tokens", [5, 12, 30, 1, 9], answers=4)
    packs = Packs(file, 10)
    assert (packs.longer, packs.answerless) == (2, 1)
    assert "2 longer: 1 truncated (1 dropped: cut before the answer)" in str(packs)
    kept = sorted(d for i in range(len(packs)) for d in packs.documents(i).tolist())
    assert kept == [0, 1, 4], "document 3 has nothing to predict, document 2 no answer left"
    drop = Packs(file, 10, "drop")
    assert "2 longer: 2 dropped" in str(drop)
    assert sorted(d for i in range(len(drop)) for d in drop.documents(i).tolist()) == [0, 4]
    with pytest.raises(DataError, match=r"document 3 has 30 tokens, and 2 of these are longer"):
        Packs(file, 10, "refuse")
    everything = Packs(file, 10, answers=False)
    assert (everything.longer, everything.answerless) == (2, 0)
    with pytest.raises(DataError, match="no document is left for samples of 3 tokens"):
        Packs(file, 3, "drop")
    assert len(Packs(file, 10, way="padded")) == 3


def test_the_ranks_of_a_machine_share_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(packing, "SHARED", 99)
    lengths = np.random.default_rng(0).integers(2, 40, 101).tolist()
    file = write_token_file(tmp_path / "f.tokens", lengths)
    calls = []
    monkeypatch.setattr(packing, "best_fit", lambda *a: calls.append(a) or best_fit(*a))
    alone = [Packs(write_token_file(tmp_path / "g.tokens", lengths[:99]), 32) for _ in range(2)]
    assert len(calls) == 2, "a small dataset is packed anew"
    assert len(alone[0]) == len(alone[1])

    first = Packs(file, 30)
    again = Packs(TokenFile(file.path), 30)
    assert len(calls) == 3
    assert str(first) == str(again)
    assert first.longer == again.longer > 0
    for number in range(len(first)):
        assert first.documents(number).tolist() == again.documents(number).tolist()

    other = write_token_file(tmp_path / "f.tokens", [*lengths[1:], lengths[0]])
    for make in (
        lambda: Packs(file, 31),
        lambda: Packs(file, 30, "drop"),
        lambda: Packs(file, 30, seed=1),
        lambda: Packs(other, 30),
    ):
        before = len(calls)
        make()
        make()
        assert len(calls) == before + 1
    indexed = {path for path in tmp_path.glob("llamax-*/packs-*") if path.suffix != ".lock"}
    assert len(indexed) == 5


def test_memory_does_not_grow_with_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "WINDOW", 256)
    lengths = np.random.default_rng(0).integers(2, 60, 6000)

    def peak(file: TokenFile) -> int:
        tracemalloc.start()
        try:
            Packs(file, 256)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peaks = []
    for documents in (1500, 6000):
        file = write_token_file(tmp_path / f"{documents}.tokens", lengths[:documents].tolist())
        peaks.append(min(peak(file) for _ in range(3)))  # a thread of another test may add to one
    assert peaks[1] < 1.2 * peaks[0]
