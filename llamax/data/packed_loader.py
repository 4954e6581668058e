"""Batches of packed or padded documents: the samples of ``Packs``, every one of the same length.

::

    ids         a0 a1 a2 | b0 b1 | pad pad        labels of a document are its next tokens,
    labels      a1 a2 a3 | b1 b2 |  -   -         those that count; padding has none
    positions    0  1  2 |  0  1 |  0   1
    documents    0  0  0 |  1  1 |  2   2         attention stays within a number
"""

from __future__ import annotations

import numpy as np

from llamax.data.batch_plan import BatchPlan
from llamax.data.loader import Batches, Rows
from llamax.data.packing import Packs
from llamax.data.shuffle import Integers
from llamax.ops import IGNORE_INDEX


class PackedLoader(Batches):
    """One data rank's share of every step, of packed samples.

    ``answers``: labels are only tokens that count.  Padding has the id of EOS, if there is one.
    """

    def __init__(
        self,
        packs: Packs,
        plan: BatchPlan,
        consumed: int = 0,
        *,
        separate_documents: bool = True,
        shuffle: bool = True,
        answers: bool = True,
    ) -> None:
        assert packs.length == plan.sequence_length
        super().__init__(len(packs), plan, consumed, shuffle)
        self.packs, self.file = packs, packs.file
        self.separate_documents = separate_documents
        self.answers = answers and packs.file.masked

    def read(self, samples: Integers) -> Rows:
        """These samples, a row each; -1 is an empty row."""
        shape, file = (len(samples), self.sequence_length), self.file
        ids = np.full(shape, file.header.eos_id or 0, np.int64)
        labels = np.full(shape, IGNORE_INDEX, np.int64)
        begins: list[tuple[int, int]] = []
        for row, sample in enumerate(samples.tolist()):
            at = 0
            members = self.packs.documents(sample) if sample >= 0 else np.zeros(0, np.int64)
            starts, stops = file.bounds(members)
            stops = np.minimum(stops, starts + self.sequence_length + 1)
            file.touch(starts, stops)
            if self.answers:
                file.touch(starts, stops, "counted")
            for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
                here = slice(at, at + stop - start - 1)
                ids[row, here] = file.tokens[start : stop - 1]
                labels[row, here] = file.tokens[start + 1 : stop]
                if self.answers:
                    given = ~file.counted(np.arange(start + 1, stop))
                    labels[row, here][given] = IGNORE_INDEX
                at = here.stop
                if at < self.sequence_length:  # the next document, or padding
                    begins.append((row, at))
        if not self.separate_documents:
            return Rows(ids, labels, None)
        rows, columns = np.array(begins, np.int64).reshape(-1, 2).T
        return Rows(ids, labels, (rows, columns))
