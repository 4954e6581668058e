"""Where a run takes place: one device, its process groups, and the few things only a machine knows.

Everything above this package is the same on every backend; only modules in here name
``torch.distributed``, ``torch.cuda`` or a vendor.

| name   | device                    | collectives               |
|--------|---------------------------|---------------------------|
| cpu    | torch CPU                 | torch.distributed, gloo   |
| cuda   | NVIDIA                    | torch.distributed, nccl   |
| xla    | trn1, or torch-xla's CPU  | xm, with replica groups   |
| neuron | trn2, trn3 by TorchNeuron | torch.distributed, neuron |
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from llamax.collectives import Axes
from llamax.errors import BackendError
from llamax.launch.env import Rendezvous
from llamax.mesh import Mesh

EAGER = ("cpu", "cuda", "neuron")  # run each operation at once: what reads values as it goes
NAMES = (*EAGER, "xla")


class Backend(Protocol):
    """What a run asks of its machine."""

    name: str
    device: torch.device
    traces: bool
    """Whether operations are recorded into programs: state is made on the host and sent."""

    def joined(self, mesh: Mesh, timeout_s: float, kv: int = 1) -> AbstractContextManager[Axes]:
        """The axes of ``mesh`` while the block runs; ``kv`` tensor ranks share one KV head."""
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


def choose(
    name: str, rendezvous: Rendezvous, threads: int = 0, stochastic_rounding: bool = False
) -> Backend:
    """The backend called ``name``; ``threads`` per CPU rank, 0 for an equal share of the cores.

    ``stochastic_rounding`` is for NeuronCores (``xla``) alone.

    Raises BackendError for a backend that is unknown or has no device here.
    """
    from llamax.backends.torch import Cpu, Cuda, Neuron

    if name == "cpu":
        return Cpu(rendezvous, threads)
    if name == "cuda":
        return Cuda(rendezvous)
    if name == "xla":
        from llamax.backends.xla import Xla

        return Xla(rendezvous, stochastic_rounding)
    if name == "neuron":
        return Neuron(rendezvous)
    raise BackendError(
        f"run.backend={name} is not available in this version of llamax; use {' or '.join(NAMES)}"
    )
