"""What a backend gives a run: a device, its process groups, and what only a machine knows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from llamax.parallel.collectives import Axes
from llamax.parallel.mesh import Mesh

EAGER = ("cpu", "cuda", "neuron")  # run each operation at once: what reads values as it goes
NAMES = (*EAGER, "xla")


class Backend(Protocol):
    """What a run asks of its machine."""

    name: str
    device: torch.device
    traces: bool
    """Whether operations are recorded into programs: state is made on the host and sent."""

    def joined(self, mesh: Mesh, timeout_s: float) -> AbstractContextManager[Axes]:
        """The axes of ``mesh`` while the block runs."""
        ...

    def fetch(self, tensors: Sequence[Tensor]) -> list[float]:
        """Device scalars as Python floats: the one place where the host waits for the device."""
        ...

    def step_boundary(self) -> None:
        """The end of a traced step: where a lazy device runs what was recorded."""
        ...

    def synchronize(self) -> None:
        """Wait for the device."""
        ...

    def barrier(self) -> None:
        """Wait until every rank of the world is here."""
        ...

    def compilations(self) -> int:
        """Programs compiled so far; 0 where none are."""
        ...

    def host_reads(self) -> int:
        """Copies from a tracing device to the host so far."""
        ...

    def memory(self) -> int:
        """Peak bytes in use so far: device memory, or the resident set of a CPU process."""
        ...

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Matrix-multiplication peak of this rank's share of the device, FLOP/s; None: unknown."""
        ...
