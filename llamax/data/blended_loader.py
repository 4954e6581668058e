"""Batches from several datasets in given proportions; the state is the number of samples used.

``--data.path="0.7 web 0.3 books"`` takes seven samples in ten from ``web``.  Which dataset sample
k of a run comes from is a table of ``PERIOD`` entries that repeats: at every place the dataset that
lags most behind its share is next, so that any stretch of samples is mixed as asked, to less than
one sample a dataset::

    weights 0.5 0.25 0.25      a b c a a b c a a b c a ...

Which of its samples that is follows from how often the dataset came before, and each dataset has
its own pseudo-random order and its own epochs.  So a blend is the same for any number of data
ranks, and resumes from one integer, like a single dataset.

Source of the greedy rule: Megatron-LM's blended dataset.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llamax.data.batch_plan import BatchPlan
from llamax.data.loader import Batches, Rows
from llamax.data.shuffle import Integers, permute_each

PERIOD = 2**14


class BlendedLoader(Batches):
    """``parts`` in proportion to ``weights``; ``shuffle=False``: one part after the other.

    ``samples``, an epoch, is as many as all parts have together, whatever of each was seen.
    """

    def __init__(
        self,
        parts: Sequence[Batches],
        weights: Sequence[float],
        plan: BatchPlan,
        consumed: int = 0,
    ) -> None:
        super().__init__(sum(part.samples for part in parts), plan, consumed, parts[0].shuffle)
        self.parts = tuple(parts)
        self._first: Integers = np.cumsum([0, *(part.samples for part in parts)])
        self._sizes: Integers = np.array([part.samples for part in parts])
        self._seeds = np.array([part.plan.seed for part in parts], np.uint64)
        self._turns = turns(weights)
        self._before = np.zeros(PERIOD, np.int64)  # how often its part came earlier in the period
        self._counts = np.zeros(len(parts), np.int64)
        for place, part in enumerate(self._turns.tolist()):
            self._before[place] = self._counts[part]
            self._counts[part] += 1

    def order(self, k: Integers) -> Integers:
        """Which sample the run's k-th one is, counted through all parts; -1 for an empty row."""
        if not self.shuffle:
            return super().order(k)
        periods, places = np.divmod(k, PERIOD)
        chosen = self._turns[places]
        nth = periods * self._counts[chosen] + self._before[places]
        sizes = self._sizes[chosen]
        epochs, places = np.divmod(nth, sizes)
        inside = permute_each(places, sizes, self._seeds[chosen], epochs)
        found: Integers = self._first[chosen] + inside
        return found

    def read(self, samples: Integers) -> Rows:
        """These samples, each row from its part; -1 is an empty row."""
        owner = np.maximum(np.searchsorted(self._first, samples, "right") - 1, 0)
        local = samples - self._first[owner]  # the first part begins at 0, so that -1 stays
        order = np.argsort(owner, kind="stable")
        starts = np.flatnonzero(np.diff(owner[order], prepend=-1)).tolist()
        found = [
            self.parts[owner[order[start]]].read(local[order[start:stop]])
            for start, stop in zip(starts, [*starts[1:], len(order)], strict=True)
        ]
        ids, labels = np.empty((2, len(order), self.sequence_length), np.int64)
        ids[order] = np.concatenate([each.ids for each in found])
        labels[order] = np.concatenate([each.labels for each in found])
        begins = [
            (order[start + each.begins[0]], each.begins[1])
            for start, each in zip(starts, found, strict=True)
            if each.begins is not None
        ]
        if not begins:
            return Rows(ids, labels, None)
        rows, columns = map(np.concatenate, zip(*begins, strict=True))
        return Rows(ids, labels, (rows, columns))


def turns(weights: Sequence[float]) -> npt.NDArray[np.int64]:
    """Which part each place of a period takes: the one that lags most behind its share."""
    share = np.array(weights, np.float64) / sum(weights)
    taken = np.zeros(len(share))
    table = np.empty(PERIOD, np.int64)
    for place in range(PERIOD):
        table[place] = np.argmax(share * (place + 1) - taken)
        taken[table[place]] += 1
    return table
