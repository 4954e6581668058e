"""NVIDIA GPUs, one for each rank, with nccl.

Not yet executed on a GPU: tests run its decisions, and the same collectives over gloo.

nccl reports what it cannot do in many lines, and a lost rank often not at all: kernels wait for it
until torch's watchdog ends the process, without a name.  So that watchdog waits longer than the
heartbeats of a run, which name the rank that fell silent.  And a rank that fails leaves by
ncclCommAbort: to end its communicators in order it would wait for what other ranks never send.
Source: ProcessGroupNCCL.cpp of torch, ``abort`` and ``shutdown``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from llamax.backends.base import TRAINING, Words
from llamax.backends.of_rank_0 import StoreBarrier
from llamax.backends.torch_distributed import TorchBackend, reason
from llamax.config.hardware import gpu_peak_flops
from llamax.parallel.collectives import Axes
from llamax.parallel.mesh import Mesh
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import BackendError
from llamax.runtime.units import count

# Launchers that start every rank by itself, and may have given it one GPU of its own.
ONE_BY_ONE = ("srun", "mpirun", "mpiexec")
MEMORY = re.compile(r"CUDA error: out of memory|'out of memory'|CUBLAS_STATUS_ALLOC_FAILED")
# Of nccl, what no other rank is to blame for.
MISTAKES = re.compile(r"nccl(InvalidUsage|InvalidArgument|UnhandledCudaError|InternalError)")
NO_KERNELS = "no kernel image is available"
# Settings of torch.backends.cuda.matmul, by default true.
NARROW_SUMS = (
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
)


class Cuda(TorchBackend):
    """torch on NVIDIA GPUs, one for each rank."""

    name, collectives = "cuda", "nccl"
    grace_s = 60.0  # enough for heartbeats: rank 0 misses a rank and ends, the others miss rank 0

    def __init__(self, rendezvous: Rendezvous, words: Words = TRAINING) -> None:
        super().__init__(rendezvous, words)
        gpus, ranks = torch.cuda.device_count(), rendezvous.local_world_size
        assigned = gpus == 1 and rendezvous.launcher in ONE_BY_ONE
        if not assigned and ranks > gpus:
            raise BackendError(self._too_few(ranks, gpus))
        self.device = torch.device("cuda", 0 if assigned else rendezvous.local_rank)
        try:
            torch.cuda.set_device(self.device)
        except RuntimeError as error:  # such as a driver that is too old
            raise BackendError(
                f"{words.backend('cuda')}: torch {torch.__version__} cannot use {self.device} "
                f"({reason(error)}); see nvidia-smi, or use {words.backend('cpu')}"
            ) from error
        self._reading = torch.cuda.Stream(self.device)
        self._barrier = StoreBarrier(rendezvous)

    @contextmanager
    def joined(self, mesh: Mesh, timeout_s: float) -> Iterator[Axes]:
        with wide_sums(), super().joined(mesh, timeout_s) as axes:
            yield axes

    def _too_few(self, ranks: int, gpus: int) -> str:
        """That ranks have no GPU each, and the remedy."""
        backend, other = self.words.backend("cuda"), self.words.backend("cpu")
        found = f"{count(ranks, 'rank')} on this machine and {count(gpus, 'visible GPU')}"
        if gpus:
            return f"{backend}: {found}, but every rank needs one; start fewer ranks or use {other}"
        if torch.version.cuda is None:
            found = f"torch {torch.__version__} is built without CUDA"
            return f"{backend}: {found}; install one with it, or use {other}"
        return f"{backend}: {found}; see nvidia-smi and CUDA_VISIBLE_DEVICES, or use {other}"

    def _check_devices(self, store: Store) -> None:
        where = self.rendezvous
        own = str(torch.cuda.get_device_properties(self.device).uuid)
        store.set(f"gpu/{where.rank}", own)
        first = where.rank - where.local_rank
        for rank in range(first, first + where.local_world_size):
            if rank != where.rank and store.get(f"gpu/{rank}").decode() == own:
                a, b = sorted((rank, where.rank))
                raise BackendError(
                    f"ranks {a} and {b} have the same GPU ({own}), but every rank needs one of its "
                    "own; show each rank another one, as srun --gpus-per-task=1 does, or all ranks "
                    "all GPUs"
                )

    def _explained(self, error: BaseException) -> BackendError | None:
        text, where = str(error), self.rendezvous
        who = f"rank {where.rank} of {where.world_size}"
        if MEMORY.search(text):
            return BackendError(f"{who} was refused memory; use more ranks{self.words.less}")
        if NO_KERNELS in text:
            return BackendError(
                f"torch {torch.__version__} has no programs for {self._gpu_name()}; install one "
                f"that has, or use {self.words.backend('cpu')}"
            )
        if isinstance(error, dist.DistError) and MISTAKES.search(text):
            return BackendError(f"{who}: nccl failed ({reason(error)}); NCCL_DEBUG=INFO says more")
        return super()._explained(error)

    def _leave(self, orderly: bool) -> None:
        if orderly:
            super()._leave(orderly)
        else:
            dist.distributed_c10d._abort_process_group()

    def fetch_from_here(self) -> Callable[[Sequence[Tensor]], list[float]]:
        here = torch.cuda.Event()
        here.record(torch.cuda.current_stream(self.device))

        def fetch(tensors: Sequence[Tensor]) -> list[float]:
            with torch.cuda.stream(self._reading):  # which has nothing else to do
                self._reading.wait_event(here)
                return self.fetch(tensors)

        return fetch

    def barrier(self) -> None:
        """Wait on the host: a collective would need a communicator of its own."""
        self._barrier.wait()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def memory(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        return gpu_peak_flops(self._gpu_name(), str(dtype).removeprefix("torch."))

    def _gpu_name(self) -> str:
        return torch.cuda.get_device_name(self.device)


@contextmanager
def wide_sums() -> Iterator[None]:
    """Let cuBLAS add the parts of 16-bit products in fp32 in the block, as ``llamax.ops`` says."""
    products, before = torch.backends.cuda.matmul, {}
    for name in NARROW_SUMS:
        before[name] = getattr(products, name)
        setattr(products, name, False)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(products, name, value)
