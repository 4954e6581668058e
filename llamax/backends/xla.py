"""The backend on torch-xla: operations are recorded, and a step runs as one compiled program.

::

    trace  --step_boundary()-->  HLO  --compile once-->  program  --run, while the host traces on

On trn1 the program runs through torch-neuronx (PJRT device NEURON).  Elsewhere the CPU client of
torch-xla runs the same HLO, where ranks are threads of one process (tests/support/ranks.py).

XLA needs all groups of an axis, not only that of this rank.  All verbs are functional.  Layouts are
pinned in all-reduce only, as in neuronx-distributed: pinned, ``xm.all_gather`` becomes a pad at a
rank-dependent place and an all-reduce, and a graph that mixes pinned and free all-reduces is
refused.

Sources: PyTorch/XLA 2.9, "PJRT Runtime" and "API guide"; AWS Neuron, "PyTorch NeuronX
(torch-neuronx) developer guide for training" and its environment variables.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llamax.backends import neuron_memory, nxd, xla_install
from llamax.backends.base import TRAINING, Words
from llamax.backends.of_rank_0 import StoreBarrier, of_rank_0
from llamax.config.hardware import default_machine, load_machine
from llamax.parallel.collectives import Axes, Axis, Reduction, Solo
from llamax.parallel.mesh import EDGES, Groups, Mesh
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import BackendError


class XlaAxis(Axis):
    """An axis over the collectives of ``xm``, for global ``rank``.

    ``widen``: all-reduce 16-bit types in float32; the CPU client cannot do so in bfloat16.
    """

    def __init__(
        self, name: str, groups: Groups, rank: int, device: torch.device, widen: bool = False
    ) -> None:
        import torch_xla.core.xla_model as xm

        self.name, self.xm, self.widen = name, xm, widen
        self.groups = [list(group) for group in groups]
        group = next(group for group in self.groups if rank in group)
        self.size, self.rank = len(group), group.index(rank)
        self.rank_index = torch.tensor([self.rank], dtype=torch.int32).to(device)

    def all_reduce(self, x: Tensor, op: Reduction = "sum") -> Tensor:
        if self.widen and x.dtype in (torch.bfloat16, torch.float16):
            return self.all_reduce(x.float(), op).to(x.dtype)
        y: Tensor = self.xm.all_reduce(op, x, groups=self.groups)
        return y

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        y: Tensor = self.xm.all_gather(x, dim % x.dim(), groups=self.groups, pin_layout=False)
        return y

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        y: Tensor = self.xm.reduce_scatter(
            "sum",
            x,
            scale=1.0,
            scatter_dim=self._divisible(x, dim),
            shard_count=self.size,
            groups=self.groups,
            pin_layout=False,
        )
        return y

    def all_to_all(self, x: Tensor, split: int, concat: int) -> Tensor:
        y: Tensor = self.xm.all_to_all(
            x,
            self._divisible(x, split),
            concat % x.dim(),
            self.size,
            groups=self.groups,
            pin_layout=False,
        )
        return y

    def start_shift(self, x: Tensor, by: int = 1) -> Callable[[], Tensor]:
        pairs = [
            [group[place], group[(place + by) % self.size]]
            for group in self.groups
            for place in range(self.size)
        ]
        # Recorded here: the order of collectives is that of their starts.
        y: Tensor = self.xm.collective_permute(x, pairs)
        return lambda: y

    def _divisible(self, x: Tensor, dim: int) -> int:
        """``dim`` counted from the front; raises ValueError where its size is not divisible."""
        dim %= x.dim()
        if x.shape[dim] % self.size:
            raise ValueError(
                f"{self.name}: dim {dim} of {tuple(x.shape)} is not divisible by {self.size}"
            )
        return dim


def axes(mesh: Mesh, rank: int, device: torch.device, widen: bool = False) -> Axes:
    """The axes of ``mesh`` for global ``rank``, which may be a rank that is only traced."""

    def axis(name: str, groups: Groups) -> Axis:
        groups = mesh.completed(groups) if name in EDGES else groups
        if len(groups[0]) == 1:
            return Solo(name, device)
        return XlaAxis(name, groups, rank, device, widen)

    return Axes.of(mesh, rank, axis)


def begin_collectives(world: Axis, device: torch.device) -> Tensor:
    """Sum a one of each rank in the first program of all, and wait for it: the size of the world.

    The Neuron runtime sets collectives up with all ranks of the world, when each loads its first
    program that has some.  Stages of a pipeline begin with different programs, at different times.
    Source: neuronx_distributed 0.18, ``parallel_state.initialize_model_parallel``, does the same.
    """
    import torch_xla
    import torch_xla.core.xla_model as xm

    size = world.all_reduce(torch.ones(1).to(device))
    torch_xla.sync()
    xm.wait_device_ops()
    return size


def recomputed(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """``function(*tensors)``, computed again in backward behind a barrier.

    Without the barrier the compiler would merge the two computations and keep the first values.
    torch-xla's checkpoint needs an input that requires a gradient.  Modules of a program's own that
    draw get the random numbers of before.
    """
    from torch_xla.utils.checkpoint import checkpoint

    if not any(tensor.requires_grad for tensor in tensors):
        tensors = (tensors[0].detach().requires_grad_(), *tensors[1:])
    return checkpoint(function, *tensors, use_reentrant=True)


class Xla:
    """One NeuronCore, or one device of the CPU client.

    ``stochastic_rounding``: NeuronCores round float32 to bfloat16 up or down at random, with
    proportional probability, instead of to nearest (NEURON_RT_STOCHASTIC_ROUNDING_EN).
    Raises BackendError where torch-xla is not installed, does not match torch, or has no device.
    """

    name = "xla"
    traces = True

    def __init__(
        self,
        rendezvous: Rendezvous,
        stochastic_rounding: bool = False,
        words: Words = TRAINING,
    ) -> None:
        self.rendezvous, self.words = rendezvous, words
        self.neuron = xla_install.configure(os.environ, rendezvous, stochastic_rounding, words)
        import torch_xla
        import torch_xla.core.xla_model as xm
        import torch_xla.debug.metrics as metrics
        import torch_xla.runtime as runtime

        self.torch_xla, self.xm, self.metrics, self.runtime = torch_xla, xm, metrics, runtime
        if self.neuron and rendezvous.world_size > 1:
            import torch_xla.distributed.xla_backend  # registers "xla"

            dist.init_process_group("xla", init_method="xla://")
        if runtime.world_size() != rendezvous.world_size:
            raise BackendError(
                f"{words.backend('xla')}: torch-xla has a world of {runtime.world_size()}, the "
                f"launcher one of {rendezvous.world_size}; without NeuronCores every process is a "
                f"world of one: start one rank, or use {words.backend('cpu')}"
            )
        self.device: torch.device = torch_xla.device()
        self._barrier, self._most_memory = StoreBarrier(rendezvous), 0
        self._fallbacks = set(metrics.executed_fallback_ops())

    @contextmanager
    def joined(self, mesh: Mesh, timeout_s: float) -> Iterator[Axes]:
        """The axes of ``mesh``; the collectives' time limit is NEURON_RT_EXEC_TIMEOUT.

        On NeuronCores the ranks are placed as trn1 requires, which is also the placement of
        neuronx-distributed, if that is installed.
        """
        try:
            if self.neuron and self.rendezvous.world_size > 1:
                with nxd.shared_groups(mesh.on_trn1(self.rendezvous.local_world_size)) as placed:
                    found = axes(placed, self.rendezvous.rank, self.device)
                    if placed.pp > 1:
                        begin_collectives(found.world, self.device)
                    yield found
            else:
                widen = not self.neuron
                yield axes(mesh, self.rendezvous.rank, self.device, widen)
        finally:
            if self.neuron and dist.is_initialized():
                dist.destroy_process_group()

    def fetch(self, tensors: Sequence[Tensor]) -> list[float]:
        """Waits for the step that computed the tensors, not for later ones."""
        return [float(tensor.cpu()) for tensor in tensors]

    def fetch_from_here(self) -> Callable[[Sequence[Tensor]], list[float]]:
        return self.fetch

    def step_boundary(self) -> None:
        """Compile the recorded program, unless it is cached, and start it; does not wait.

        Raises BackendError where an operation ran on the host because torch-xla cannot compile it.
        """
        self.torch_xla.sync()
        if found := set(self.metrics.executed_fallback_ops()) - self._fallbacks:
            raise BackendError(
                f"{self.words.backend('xla')}: {', '.join(sorted(found))} ran on the host in a "
                "step; use "
                "operations that torch-xla compiles, and backend.fetch instead of .item()"
            )

    def synchronize(self) -> None:
        self.xm.wait_device_ops()

    def barrier(self) -> None:
        """Wait on the host: a collective would be another program to compile."""
        self._barrier.wait()

    def of_rank_0(self, name: str, value: int) -> int:
        return of_rank_0(self.rendezvous, name, value)

    def memory(self) -> int:
        """The most bytes that a call found in use; 0 where the driver does not show them."""
        if not self.neuron:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        core = neuron_memory.core(os.environ, self.rendezvous.local_rank)
        self._most_memory = max(self._most_memory, neuron_memory.used(core) or 0)
        return self._most_memory

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        if not self.neuron:
            return None
        return load_machine(default_machine(self.name)).peak_flops(
            str(dtype).removeprefix("torch.")
        )

    def compilations(self) -> int:
        """Programs compiled in this process so far."""
        return int(self.metrics.counter_value("UncachedCompile") or 0)

    def host_reads(self) -> int:
        """Copies from the device to the host so far."""
        return int((self.metrics.metric_data("TransferFromDeviceTime") or (0,))[0])
