"""The loader: every token once an epoch, one global order, one integer of state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamax.data.batch_plan import BatchPlan
from llamax.data.header import Header
from llamax.data.loader import Batch, Loader, permute
from llamax.data.token_file import TokenFile, TokenWriter
from llamax.ops import IGNORE_INDEX
from llamax.runtime.errors import DataError


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory):
    """A file of documents of these lengths whose tokens are 0, 1, 2, ..."""
    folder = tmp_path_factory.mktemp("tokens")

    def build(lengths: list[int]) -> TokenFile:
        path: Path = folder / "x.tokens"
        with TokenWriter(path, Header("f", 2**20)) as writer:
            writer.add(np.arange(sum(lengths)), np.array(lengths, np.int64), 1)
        return TokenFile(path)

    return build


def rows(batches: list[Batch]) -> list[list[int]]:
    return [row for batch in batches for row in batch.labels.tolist()]


lengths = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda x: sum(x) >= 2)


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 2**31))
@settings(max_examples=60)
def test_the_order_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(n), n, seed, epoch).tolist()) == list(range(n))


def test_the_order_looks_random() -> None:
    """Displacements, neighbours and epochs are as unlike as those of a shuffle."""
    n = 20_000
    one, two, other = (
        permute(np.arange(n), n, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))
    )
    for order in (one, two, other):
        assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.03
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.03
        assert (order == np.arange(n)).sum() < 10
        assert (np.abs(np.diff(order)) == 1).sum() < 20
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.03
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.03


@given(
    lengths=lengths,
    sequence=st.integers(1, 17),
    micro=st.integers(1, 3),
    degree=st.sampled_from([1, 2, 3, 4]),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=80)
def test_each_token_is_a_label_once_an_epoch(
    make, lengths, sequence, micro, degree, accumulation, seed
) -> None:
    file = make(lengths)
    ranks = [
        Loader(
            file,
            BatchPlan(seed, sequence, micro * degree * accumulation, micro, rank, degree),
            separate_documents=False,
        )
        for rank in range(degree)
    ]
    seen: list[list[int]] = []
    while len(seen) < ranks[0].samples:
        steps = [rank.step() for rank in ranks]
        seen += [row for m in range(accumulation) for step in steps for row in rows([step[m]])]
    labels = [label for row in seen[: ranks[0].samples] for label in row if label != IGNORE_INDEX]
    assert sorted(labels) == list(range(1, sum(lengths)))


@given(lengths=lengths, seed=st.integers(0, 9), start=st.integers(0, 200))
@settings(max_examples=40)
def test_any_number_of_ranks_sees_the_same_order(make, lengths, seed, start) -> None:
    file = make(lengths)
    orders = []
    for degree in (1, 2, 4):
        ranks = [
            Loader(file, BatchPlan(seed, 5, 8, 2, rank, degree), start) for rank in range(degree)
        ]
        steps = [[rank.step() for rank in ranks] for _ in range(3)]
        orders.append(
            [
                row
                for step in steps
                for m in range(len(step[0]))
                for rank in step
                for row in rows([rank[m]])
            ]
        )
    assert orders[0] == orders[1] == orders[2]


@given(k=st.integers(0, 500))
@settings(max_examples=20)
def test_one_integer_resumes_the_run(make, k: int) -> None:
    file = make([7, 30, 1, 90, 4])
    first = Loader(file, BatchPlan(3, 6, 4, 2))
    for _ in range(k):
        first.consumed += first.global_batch
    going, resumed = first, Loader(file, first.plan, consumed=first.consumed)
    for _ in range(2):
        for one, other in zip(going.step(), resumed.step(), strict=True):
            for a, b in zip(one, other, strict=True):
                assert torch.equal(a, b)
    assert going.consumed == resumed.consumed == 4 * (k + 2)


def expected(lengths: list[int], sequence: int, sample: int, separate: bool) -> list[tuple]:
    """(id, label, position, document) of a sample, token by token."""
    tokens = list(range(sum(lengths)))
    home = [d for d, length in enumerate(lengths) for _ in range(length)]
    out = []
    start, position, document = sample * sequence, 0, 0
    for t in range(start, start + sequence):
        if t >= len(tokens):
            break
        if separate and t > start and home[t] != home[t - 1]:
            position, document = 0, document + 1
        ends = t + 1 >= len(tokens) or (separate and home[t + 1] != home[t])
        out.append((tokens[t], IGNORE_INDEX if ends else tokens[t + 1], position, document))
        position += 1
    return out


@given(lengths=lengths, sequence=st.integers(1, 17), separate=st.booleans())
@settings(max_examples=80)
def test_windows_hold_what_they_should(make, lengths, sequence, separate) -> None:
    file = make(lengths)
    plan = BatchPlan(0, sequence, 3, 3)
    loader = Loader(file, plan, separate_documents=separate, shuffle=False)
    sample = 0
    for (batch,) in loader.epoch():
        assert batch.ids.dtype == batch.labels.dtype == batch.positions.dtype == torch.int64
        assert batch.ids.shape == batch.labels.shape == batch.positions.shape == (3, sequence)
        assert (batch.documents is not None) == separate
        if separate:
            assert batch.documents.dtype == torch.int32
            assert batch.documents.shape == (3, sequence)
        for row in range(3):
            want = expected(lengths, sequence, sample, separate) if sample < loader.samples else []
            size = len(want)
            assert batch.labels[row, size:].eq(IGNORE_INDEX).all()
            columns = [batch.ids, batch.labels, batch.positions]
            got = [column[row, :size].tolist() for column in columns]
            assert got == [[each[i] for each in want] for i in range(3)]
            if separate:
                assert batch.documents[row, :size].tolist() == [each[3] for each in want]
            sample += 1
    assert sample >= loader.samples


@given(lengths=lengths, degree=st.sampled_from([1, 2, 4]))
@settings(max_examples=30)
def test_validation_covers_the_file_once(make, lengths, degree) -> None:
    file = make(lengths)
    seen = []
    for rank in range(degree):
        plan = BatchPlan(0, 4, 4, 1, rank, degree)
        loader = Loader(file, plan, shuffle=False, separate_documents=False)
        seen += [label for step in loader.epoch() for row in rows(step) for label in row]
    assert sorted(x for x in seen if x != IGNORE_INDEX) == list(range(1, sum(lengths)))


def test_gathering_checks_blocks_before_use(make, tmp_path: Path) -> None:
    whole = make([600_000, 100])
    raw = bytearray(whole.path.read_bytes())
    raw[-5000] ^= 1
    (tmp_path / "bad.tokens").write_bytes(raw)
    file = TokenFile(tmp_path / "bad.tokens", "read")
    loader = Loader(file, BatchPlan(0, 100, 1, 1), shuffle=False, separate_documents=False)
    loader.at(0)
    with pytest.raises(DataError, match="do not match their checksum"):
        loader.at(loader.samples - 1)


def test_too_few_tokens_are_refused(make) -> None:
    with pytest.raises(DataError, match="has 1 token, and a sample needs 2"):
        Loader(make([1]), BatchPlan(0, 4, 1, 1))
