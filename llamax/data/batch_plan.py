"""How a global batch is dealt over data ranks and microsteps.

::

    global batch of 8      0 1 | 2 3 | 4 5 | 6 7        micro_batch 2, degree 2
    rank 0                 0 1         4 5              2 microsteps of 2 samples
    rank 1                       2 3         6 7

Microsteps are outermost, so that the samples of a step do not depend on the number of data ranks.
Context-parallel ranks take the same samples, and a part of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llamax.config.schema import DataConfig
from llamax.data.shuffle import Integers
from llamax.parallel.mesh import ALONE, Seat


@dataclass(frozen=True)
class BatchPlan:
    """The samples of each step for data rank ``rank`` of ``degree``.

    ``seed`` decides the order of samples, ``sequence_length`` is that of one in tokens;
    ``global_batch`` and ``micro_batch`` count samples; ``cp`` says which part of each sample.
    """

    seed: int
    sequence_length: int
    global_batch: int
    micro_batch: int
    rank: int = 0
    degree: int = 1
    cp: Seat = ALONE

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.degree
        assert self.global_batch % (self.micro_batch * self.degree) == 0

    @classmethod
    def of(cls, data: DataConfig, seed: int, rank: int, degree: int, cp: Seat = ALONE) -> BatchPlan:
        """The plan of a run's data section."""
        batch = data.global_batch, data.micro_batch
        return cls(seed, data.sequence_length, *batch, rank, degree, cp)

    def places(self) -> Integers:
        """The places of this rank's samples in a global batch: [microsteps, micro_batch]."""
        dealt = np.arange(self.global_batch).reshape(-1, self.degree, self.micro_batch)
        places: Integers = dealt[:, self.rank, :]
        return places
