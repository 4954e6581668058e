"""Where a run takes place: one device, its process groups, and the few things only a machine knows.

Everything above this package is the same on every backend; only modules in here name
``torch.distributed``, ``torch.cuda`` or a vendor.

======  =========================  =========================
name    device                     collectives
======  =========================  =========================
cpu     torch CPU                  torch.distributed, gloo
cuda    NVIDIA                     torch.distributed, nccl
xla     trn1, or torch-xla's CPU   xm, with replica groups
neuron  trn2, trn3 by TorchNeuron  torch.distributed, neuron
======  =========================  =========================
"""

from __future__ import annotations

from llamax.backends.base import NAMES, Backend
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import BackendError


def choose(
    name: str, rendezvous: Rendezvous, threads: int = 0, stochastic_rounding: bool = False
) -> Backend:
    """The backend called ``name``; ``threads`` per CPU rank, 0 for an equal share of the cores.

    ``stochastic_rounding`` is for NeuronCores (``xla``) alone.

    Raises BackendError for a backend that is unknown or has no device here.
    """
    from llamax.backends.torch_distributed import Cpu, Cuda, Neuron

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
