"""Batches as a pure function of (seed, step, data rank): the state is one integer.

A sample is a window of S + 1 tokens, one window every S tokens, so each token of the corpus (but
the very first) is the label of exactly one position::

    tokens     t0 t1 t2 t3 t4 t5 t6 t7 ...          S = 3
    sample 0   t0 t1 t2 t3            ids t0 t1 t2   labels t1 t2 t3
    sample 1            t3 t4 t5 t6   ids t3 t4 t5   labels t4 t5 t6

An epoch visits the n samples in a pseudo-random order that is computed, not stored: sample k of a
run is ``permute(k % n)`` under the key (seed, k // n).  A step takes the next ``global_batch``
values of k; micro-batch m on data rank r takes a run of ``micro_batch`` of them, microsteps
outermost, so any number of data ranks sees the same samples in the same steps.

Documents in one window can be kept apart: positions restart and ``documents`` numbers them for
attention.  A label that belongs to another document than its position is then ignored, because the
loss of a packed sample should be what its documents would give alone; the first token of a text is
learnt from the BOS before it.  Without separation the corpus is one stream and every label counts.

In instruction data only the tokens of answers are labels, unless ``answers`` is False.

The permutation is ``shuffle.permute``; packed and padded samples are in
``llamax.data.packed_loader``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llamax.data.batch_plan import BatchPlan
from llamax.data.shuffle import Integers, permute
from llamax.data.stream import Stream
from llamax.ops import IGNORE_INDEX
from llamax.parallel import context_parallel
from llamax.runtime.errors import DataError
from llamax.runtime.units import count


class Batch(NamedTuple):
    """Rows of samples: ids, labels (or IGNORE_INDEX), positions [B,S]; documents [B,S] or None.

    With context parallelism these are a rank's share of each row, [B,s], and documents are those of
    the whole rows, in rank order (``parallel.context_parallel``).
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    documents: Tensor | None


class Rows(NamedTuple):
    """Samples as they are read: ids and labels [B,S], and where documents begin inside rows.

    ``begins`` are rows and columns; None where documents are not kept apart.
    """

    ids: Integers
    labels: Integers
    begins: tuple[Integers, Integers] | None


class Batches(ABC):
    """One data rank's share of every step, of ``samples`` that a subclass reads.

    ``shuffle=False`` is for validation: samples come in their order and, after the last one, empty
    rows (no labels) fill the batch, so ``epoch`` covers every sample exactly once.
    """

    def __init__(
        self,
        samples: int,
        plan: BatchPlan,
        consumed: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.samples, self.plan, self.consumed = samples, plan, consumed
        self.sequence_length, self.global_batch = plan.sequence_length, plan.global_batch
        self.shuffle, self._places = shuffle, plan.places()

    @property
    def steps(self) -> int:
        """Steps that an epoch takes, the last one perhaps not full."""
        return -(-self.samples // self.global_batch)

    def step(self) -> list[Batch]:
        """The micro-batches of the next step."""
        batches = self.at(self.consumed)
        self.consumed += self.global_batch
        return batches

    @property
    def ended_epoch(self) -> bool:
        """Whether the last step took the last sample of an epoch."""
        before = self.consumed - self.global_batch
        return self.consumed // self.samples > before // self.samples

    def epoch(self) -> Iterator[list[Batch]]:
        """The steps of one epoch from the start of the file's order; ``consumed`` stays."""
        for step in range(self.steps):
            yield self.at(step * self.global_batch)

    def at(self, consumed: int) -> list[Batch]:
        """The micro-batches of the step that begins after ``consumed`` samples."""
        microsteps, rows = self._places.shape
        ids, labels, positions, documents = self._cut(
            lay_out(self.read(self.order(consumed + self._places.ravel())))
        )
        return [
            Batch(
                ids[start : start + rows],
                labels[start : start + rows],
                positions[start : start + rows],
                None if documents is None else documents[start : start + rows],
            )
            for start in range(0, microsteps * rows, rows)
        ]

    def order(self, k: Integers) -> Integers:
        """Which sample the run's k-th one is; -1 for an empty row."""
        if not self.shuffle:
            return np.where(k < self.samples, k, -1)
        epochs, places = np.divmod(k, self.samples)
        chosen = np.empty_like(k)
        for epoch in np.unique(epochs).tolist():
            of = epochs == epoch
            chosen[of] = permute(places[of], self.samples, self.plan.seed, epoch)
        return chosen

    def sample_ids(self, consumed: int) -> list[int]:
        """The samples of the global batch that begins after ``consumed`` samples."""
        ids: list[int] = self.order(consumed + np.arange(self.global_batch)).tolist()
        return ids

    def _cut(self, whole: Batch) -> Batch:
        """A context rank's share of rows; labels were shifted before, so none is lost at a cut."""
        rank, size = self.plan.cp
        if size == 1:
            return whole
        ids, labels, positions = (context_parallel.cut(x, rank, size) for x in whole[:3])
        documents = whole.documents
        if documents is not None:
            documents = context_parallel.in_rank_order(documents, size)
        return Batch(ids, labels, positions, documents)

    @abstractmethod
    def read(self, samples: Integers) -> Rows:
        """These samples, a row each; -1 is an empty row."""


class Loader(Batches):
    """Windows of a token file's stream; ``answers``: labels are only tokens that count.

    Raises DataError where the file holds no sample.
    """

    def __init__(
        self,
        file: Stream,
        plan: BatchPlan,
        consumed: int = 0,
        *,
        separate_documents: bool = True,
        shuffle: bool = True,
        answers: bool = True,
    ) -> None:
        if len(file) < 2:
            raise DataError(
                f"{file.path}: has {count(len(file), 'token')}, and a sample needs 2; prepare "
                "more text"
            )
        sequence_length = plan.sequence_length
        super().__init__(-(-(len(file) - 1) // sequence_length), plan, consumed, shuffle)
        self.file, self.separate_documents = file, separate_documents
        self.answers = answers and file.masked
        # Every window that lies whole in the file, as rows of one overlapping view: no copy.
        whole = (len(file) - 1) // sequence_length
        step = file.tokens.itemsize
        self._windows: npt.NDArray[Any] = np.lib.stride_tricks.as_strided(
            file.tokens, (whole, sequence_length + 1), (sequence_length * step, step)
        )

    def read(self, samples: Integers) -> Rows:
        """These samples, a row each; -1 is an empty row."""
        S = self.sequence_length
        starts = samples * S
        there: Any = np.s_[:]  # the rows that are not empty
        if whole := bool(samples.min() >= 0 and samples.max() < len(self._windows)):
            stops = starts + (S + 1)
            self.file.touch(starts, stops)
            window = self._windows[samples].astype(np.int64)
        else:
            real = np.where(samples >= 0, np.minimum(len(self.file) - starts, S + 1), 0)
            there, stops = real > 0, starts + real
            self.file.touch(starts[there], stops[there])
            window = np.zeros((len(samples), S + 1), np.int64)
            for row in np.flatnonzero(there):
                window[row, : real[row]] = self.file.tokens[starts[row] : stops[row]]
        ids, labels = window[:, :-1], window[:, 1:]
        if self.answers or self.separate_documents or not whole:
            labels = labels.copy()  # some will be IGNORE_INDEX; else they may share the ids' memory
        if not whole:
            for row in np.flatnonzero(real <= S):
                labels[row, max(real[row] - 1, 0) :] = IGNORE_INDEX
        if self.answers:
            self.file.touch(starts[there], stops[there], "counted")
            labelled = np.maximum(starts, 0)[:, None] + np.arange(1, S + 1)
            labels[~self.file.counted(np.minimum(labelled, len(self.file) - 1))] = IGNORE_INDEX
        if not self.separate_documents:
            return Rows(ids, labels, None)
        rows, columns = self._boundaries(starts, stops)
        labels[rows, columns - 1] = IGNORE_INDEX
        inner = columns < S
        return Rows(ids, labels, (rows[inner], columns[inner]))

    def _boundaries(self, starts: Integers, stops: Integers) -> tuple[Integers, Integers]:
        """(row, column) of every document that begins inside a window, not at its first token."""
        every = np.full(1, self.file.num_documents + 1)
        self.file.touch(np.zeros(1, np.int64), every, "documents")
        rows, begins = self.file.begins(np.maximum(starts, 0), np.maximum(stops, 0))
        return rows, begins - starts[rows]


def lay_out(rows: Rows) -> Batch:
    """The batch of rows: in each document positions begin at 0."""
    ids, labels, begins = rows
    place = np.arange(ids.shape[1])
    if begins is None:
        places = torch.from_numpy(place).expand(ids.shape)
        return Batch(torch.from_numpy(ids), torch.from_numpy(labels), places, None)
    # The batch end to end as pieces of one document each: a piece begins with every row and with
    # every document inside one.
    S = len(place)
    row_begins = np.arange(len(ids)) * S
    pieces = np.union1d(row_begins, row_begins[begins[0]] + begins[1])
    sizes = np.diff(pieces, append=ids.size)
    numbers = np.arange(len(pieces)) - np.searchsorted(pieces, pieces // S * S)
    apart = np.repeat(pieces % S, sizes).reshape(ids.shape)
    np.subtract(place, apart, out=apart)
    documents = np.repeat(numbers.astype(np.int32), sizes).reshape(ids.shape)
    return Batch(*map(torch.from_numpy, (ids, labels, apart, documents)))
