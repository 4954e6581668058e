"""The samples of a split: how many an epoch has, and this rank's batches of them.

==========  ======================================================================================
best-fit    whole documents packed tightly (``data.packing``); the default for instruction data
concat      the stream of all documents, cut where a sample is full; the default for text
padded      one document in each sample
==========  ======================================================================================

Counting needs no torch, so that the planner counts as training does; only ``loader`` imports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llamax.config.schema import DataConfig
from llamax.data.batch_plan import BatchPlan
from llamax.data.dataset import Mixture, Split
from llamax.data.packing import Packs
from llamax.parallel.mesh import ALONE, Seat
from llamax.runtime.errors import DataError
from llamax.runtime.units import count

if TYPE_CHECKING:
    from llamax.data.loader import Batches
    from llamax.parallel.collectives import Axis


class Samples:
    """The samples of one split; ``packs`` is None where they are windows of the stream.

    A blend has samples of each of its ``parts``.
    """

    def __init__(self, split: Split, data: DataConfig, seed: int) -> None:
        self.data, self.seed = data, seed
        self.answers = data.labels == "answers"
        self.packs: Packs | None = None
        self.parts: list[Samples] = []
        if isinstance(split, Mixture):
            self.parts = [Samples(part, data, seed) for part in split.parts]
            self.weights = split.weights
            return
        self.file = file = split
        way = ("best-fit" if file.masked else "concat") if data.packing == "auto" else data.packing
        if way != "concat":
            self.packs = Packs(file, data.sequence_length, data.too_long, way, seed, self.answers)

    def __len__(self) -> int:
        """The number of samples in an epoch."""
        if self.parts:
            return sum(map(len, self.parts))
        if self.packs is not None:
            return len(self.packs)
        return max(1, -(-(len(self.file) - 1) // self.data.sequence_length))

    def has_labels(self, batches: int = 0) -> bool:
        """Whether some token of the first ``batches`` without shuffling is a label; 0: of all.

        It reads samples up to the first label.
        """
        from llamax.ops import IGNORE_INDEX

        loader = self.loader(ALONE, 0, shuffle=False)
        count = min(loader.samples, (batches or loader.steps) * loader.global_batch)
        samples = (loader.read(np.array([sample])) for sample in range(count))
        return any((sample.labels != IGNORE_INDEX).any() for sample in samples)

    def check_labels(self, batches: int = 0, more: str = "", every: str = "") -> None:
        """Raise DataError if no token of the first ``batches`` is a label: the loss would be 0 / 0.

        ``more`` and ``every`` are what to set for more batches, and for labels beside answers.
        """
        if self.has_labels(batches):
            return
        files = [part.file for part in self.parts or [self]]
        place, remedy = "it", "prepare documents of two tokens or more"
        if batches and self.has_labels():
            first = f"first {count(batches, 'batch')}" if batches > 1 else "first batch"
            place, remedy = f"its {first}", f"raise {more}"
        elif self.answers and any(file.masked for file in files):
            remedy = f"set {every}, or prepare rows with answers"
        raise DataError(f"{files[0].path}: no token of {place} counts in the loss; {remedy}")

    def loader(self, dp: Axis | Seat, consumed: int, shuffle: bool, cp: Seat = ALONE) -> Batches:
        """This data rank's batches, after ``consumed`` samples of the run, or its part of them."""
        from llamax.data.blended_loader import BlendedLoader
        from llamax.data.loader import Loader
        from llamax.data.packed_loader import PackedLoader

        data = self.data
        plan = BatchPlan.of(data, self.seed, dp.rank, dp.size, cp)
        if self.parts:
            parts = [part.loader(dp, 0, shuffle) for part in self.parts]
            return BlendedLoader(parts, self.weights, plan, consumed)
        options = {"separate_documents": data.separate_documents, "answers": self.answers}
        if self.packs is not None:
            return PackedLoader(self.packs, plan, consumed, shuffle=shuffle, **options)
        return Loader(self.file, plan, consumed, shuffle=shuffle, **options)

    def __str__(self) -> str:
        if self.parts:
            shares = (
                f"{weight:g} x ({part})"
                for weight, part in zip(self.weights, self.parts, strict=True)
            )
            return "a blend of " + " and ".join(shares)
        if self.packs is not None:
            return str(self.packs)
        return f"concat at {self.data.sequence_length}: {count(len(self), 'sample')}"
