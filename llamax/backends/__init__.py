"""The device of a run and its process groups, one backend for each kind of machine.

All other code is the same on every backend: only modules in here import ``torch.distributed``,
``torch.cuda`` or a vendor's packages.

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

from llamax.backends.base import TRAINING, Backend, Words
from llamax.config.choices import BACKENDS
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import BackendError


def choose(
    name: str,
    rendezvous: Rendezvous,
    threads: int = 0,
    stochastic_rounding: bool = False,
    words: Words = TRAINING,
) -> Backend:
    """The backend of a name.

    ``threads``: of a rank on ``cpu``, 0 for an equal share of the cores.  ``stochastic_rounding``:
    of NeuronCores (``xla``).  ``words``: those of messages.  Raises BackendError for an unknown
    backend or one without a device.
    """
    from llamax.backends.torch_distributed import Cpu, Neuron

    if name == "cpu":
        return Cpu(rendezvous, threads, words)
    if name == "cuda":
        from llamax.backends.cuda import Cuda

        return Cuda(rendezvous, words)
    if name == "xla":
        from llamax.backends.xla import Xla

        return Xla(rendezvous, stochastic_rounding, words)
    if name == "neuron":
        return Neuron(rendezvous, words)
    raise BackendError(
        f"{words.backend(name)} is not available in this version of llamax; use "
        f"{' or '.join(BACKENDS)}"
    )
