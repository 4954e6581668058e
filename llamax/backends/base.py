"""The interface of a backend: a device, its process groups, memory and peak."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llamax.parallel.collectives import Axes
from llamax.parallel.mesh import Mesh


@dataclass(frozen=True)
class Words:
    """How messages of a backend name what the user of a program can change."""

    setting: str = "run.backend={}"
    less: str = (
        ", a smaller data.micro_batch or run.recompute=full "
        "(llamax plan shows the memory of a rank)"
    )
    wait: str = ", or raise run.timeout_s"
    dtype: str = "run.dtype=bfloat16"

    def backend(self, name: str) -> str:
        """The setting that chooses a backend."""
        return self.setting.format(name)


TRAINING = Words()
INFERENCE = Words(
    "`backend={}`", " or a smaller `batch`", "", "`dtype=bfloat16`"
)  # generate, evaluate


class Device(Protocol):
    """What a step, or a decoder, needs of a backend."""

    def step_boundary(self) -> None:
        """End a traced step: a lazy device starts the recorded program."""
        ...

    def fetch(self, tensors: Sequence[Tensor]) -> list[float]:
        """Device scalars as Python floats; the only place where the host waits for the device."""
        ...

    def fetch_from_here(self) -> Callable[[Sequence[Tensor]], list[float]]:
        """A ``fetch`` that waits for the work begun so far, and for none that begins later."""
        ...


class EagerDevice:
    """A device that runs each operation at once."""

    def step_boundary(self) -> None:
        """Nothing is pending."""

    def fetch(self, tensors: Sequence[Tensor]) -> list[float]:
        return [float(tensor) for tensor in tensors]

    def fetch_from_here(self) -> Callable[[Sequence[Tensor]], list[float]]:
        """``fetch``; devices with a queue of work give another."""
        return self.fetch


EAGER_DEVICE = EagerDevice()


class Backend(Device, Protocol):
    """The machine of one rank, as a run uses it."""

    name: str
    device: torch.device
    traces: bool
    """Whether operations are recorded into programs; state is then made on the host and copied."""

    def joined(self, mesh: Mesh, timeout_s: float) -> AbstractContextManager[Axes]:
        """The axes of ``mesh`` while the block runs."""
        ...

    def synchronize(self) -> None:
        """Wait for the device."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks of the world."""
        ...

    def of_rank_0(self, name: str, value: int) -> int:
        """What rank 0 gives as ``value``, on every rank; ``name`` differs in each call."""
        ...

    def compilations(self) -> int:
        """Programs compiled so far; 0 on eager devices."""
        ...

    def host_reads(self) -> int:
        """Copies from a lazy device to the host so far."""
        ...

    def memory(self) -> int:
        """Peak bytes in use so far: device memory, or the resident set of a CPU process.

        NeuronCores on ``xla`` show what is in use at a call, and 0 is a peak that is not known.
        """
        ...

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Peak FLOP/s of matrix products on the device of this rank; None where it is unknown."""
        ...
