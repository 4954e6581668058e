"""What the cuda backend knows of a GPU: no GPU is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llamax.backends import torch_distributed
from llamax.backends.cuda import NARROW_SUMS, Cuda
from llamax.backends.random_state import random_state, set_random_state
from llamax.backends.transfer import sent
from llamax.parallel.mesh import Mesh
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import BackendError, LostRank, Stopped
from llamax.training.heartbeat import PATIENCE_S
from llamax.training.step_result import Step

NCCL = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, {}, NCCL 2.27.5
{}
Last error:
{}
"""
LOST = NCCL.format(
    "unhandled system error (run with NCCL_DEBUG=INFO for details)",
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed",
    "socketPollConnect: connect to 10.0.0.2<41234> returned Connection refused",
)
TWICE = NCCL.format(
    "invalid usage (run with NCCL_WARN=INFO for details)",
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
    "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 53000",
)
FULL = NCCL.format(
    "unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
    "ncclUnhandledCudaError: Call to CUDA function failed.",
    "Cuda failure 2 'out of memory'",
)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What torch.cuda knows: one GPU, until a test says otherwise; ``log`` of what was asked."""
    found = SimpleNamespace(count=1, uuid="GPU-0", broken="", log=[])

    class Stream:
        def __init__(self, device: torch.device) -> None: ...

        def wait_event(self, event: str) -> None:
            found.log.append(f"wait for {event}")

    class Event:
        def record(self, stream: str) -> None:
            found.log.append(f"note in {stream}")

        def __format__(self, form: str) -> str:
            return "the event"

    @contextmanager
    def stream(other: Any) -> Iterator[None]:
        found.log.append("on the side")
        yield
        found.log.append("back")

    def set_device(device: torch.device) -> None:
        if found.broken:
            raise RuntimeError(found.broken)

    def properties(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(uuid=found.uuid)

    for name, stand_in in {
        "device_count": lambda: found.count,
        "set_device": set_device,
        "get_device_properties": properties,
        "get_device_name": lambda device: "NVIDIA H100 80GB HBM3",
        "current_stream": lambda device: "the main stream",
        "Stream": Stream,
        "Event": Event,
        "stream": stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return found


def alone() -> Cuda:
    """A backend whose tensors can be made here."""
    made = Cuda(Rendezvous())
    made.device = torch.device("cpu")
    return made


def of_two(launcher: str, rank: int = 1) -> Rendezvous:
    return Rendezvous(rank, 2, rank, 2, launcher=launcher)


@pytest.mark.parametrize("launcher", ["srun", "mpirun", "mpiexec"])
def test_a_launcher_may_give_each_rank_one_gpu(gpus: SimpleNamespace, launcher: str) -> None:
    assert Cuda(of_two(launcher)).device == torch.device("cuda", 0)
    gpus.count = 2
    assert Cuda(of_two(launcher)).device == torch.device("cuda", 1)


def test_every_rank_needs_a_gpu(gpus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="2 ranks on this machine and 1 visible GPU, but every"):
        Cuda(of_two("torchrun"))
    gpus.count = 0
    with pytest.raises(BackendError, match=r"torch .* is built without CUDA; install one with it"):
        Cuda(Rendezvous())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(BackendError, match="1 rank on this machine and 0 visible GPUs; see nvidia"):
        Cuda(Rendezvous())
    gpus.count, gpus.broken = 1, "The NVIDIA driver on your system is too old\nmore"
    with pytest.raises(BackendError, match=r"cannot use cuda:0 \(The NVIDIA driver .* too old\);"):
        Cuda(Rendezvous())


def test_ranks_that_share_a_gpu_are_named(gpus: SimpleNamespace) -> None:
    store = dist.HashStore()
    store.set("gpu/0", "GPU-0")
    with pytest.raises(BackendError, match=r"ranks 0 and 1 have the same GPU \(GPU-0\)"):
        Cuda(of_two("srun"))._check_devices(store)
    gpus.uuid = "GPU-1"
    Cuda(of_two("srun"))._check_devices(store)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (dist.DistBackendError(LOST), LostRank, r"\(socketPollConnect: connect to 10.* refused\)"),
        (dist.DistBackendError(TWICE), BackendError, r"nccl failed \(Duplicate GPU detected"),
        (dist.DistBackendError(FULL), BackendError, "was refused memory; use more ranks"),
        (RuntimeError("CUDA error: out of memory\nCompile with"), BackendError, "refused memory"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"),
            BackendError,
            "was refused 20.00 MiB of memory",
        ),
        (
            RuntimeError("CUDA error: no kernel image is available for execution on the device"),
            BackendError,
            "has no programs for NVIDIA H100",
        ),
        (RuntimeError("a mistake of a program"), RuntimeError, "a mistake"),
    ],
)
def test_what_nccl_and_cuda_report_is_one_line(
    gpus: SimpleNamespace, error: Exception, kind: type[Exception], words: str
) -> None:
    with (
        pytest.raises(kind, match=words) as raised,
        alone().joined(Mesh(), 1.0),
    ):
        raise error
    assert type(raised.value) is kind
    assert kind is RuntimeError or "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("error", "left"),
    [
        (None, "destroyed"),
        (Stopped("a signal came"), "destroyed"),
        (SystemExit(75), "destroyed"),
        (BackendError("this rank alone"), "aborted"),
        (KeyboardInterrupt(), "aborted"),
    ],
)
def test_a_rank_that_fails_waits_for_no_other(
    gpus: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException | None,
    left: str,
) -> None:
    done: list[str] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroyed"))
    monkeypatch.setattr(
        dist.distributed_c10d, "_abort_process_group", lambda: done.append("aborted")
    )
    with pytest.raises(type(error)) if error else nullcontext(), alone().joined(Mesh(), 1.0):
        if error is not None:
            raise error
    assert done == [left]


def test_heartbeats_come_before_the_watchdog_of_nccl(
    gpus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They end a run at its timeout and their patience, twice: for a rank, and for rank 0."""
    waits: list[timedelta] = []

    class Joined(Exception):
        pass

    def init(*_: Any, timeout: timedelta, **more: Any) -> None:
        waits.append(timeout)
        raise Joined

    gpus.uuid = "GPU-1"
    store = dist.HashStore()
    monkeypatch.setattr(torch_distributed, "WORLDS", iter([7]))
    store.set("llamax/0/7/gpu/0", "GPU-0")
    monkeypatch.setattr(torch_distributed, "_store", lambda *_: store)
    monkeypatch.setattr(dist, "init_process_group", init)
    with pytest.raises(Joined), Cuda(of_two("srun")).joined(Mesh(dp=2), 100.0):
        pass
    beats = 2 * 2 * 5.0  # the longest interval, in which a file is read
    assert waits[0] >= timedelta(seconds=100.0 + 2 * PATIENCE_S + beats)


def test_a_step_is_read_while_the_next_one_runs(gpus: SimpleNamespace) -> None:
    one, backend = torch.tensor(1.0), Cuda(Rendezvous())
    step = Step(1, one, one, one, torch.tensor(0.0), backend)
    step.mark_begun()
    gpus.log.append("the next step begins")
    assert step.result.loss == 1.0
    assert gpus.log == [
        "note in the main stream",
        "the next step begins",
        "on the side",
        "wait for the event",
        "back",
    ]
    validated = Step(2, one, one, one, torch.tensor(0.0), backend)
    validated.mark_begun()
    validated.validation_loss = one
    del gpus.log[:]
    assert validated.result.validation_loss == 1.0
    assert not gpus.log, "it was computed later"


@pytest.mark.parametrize(
    ("gpu", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 80GB HBM3", torch.float32, 67e12),
        ("Some GPU", torch.float32, None),
    ],
)
def test_a_run_is_rated_against_the_peak_of_its_type(
    monkeypatch: pytest.MonkeyPatch, gpu: str, dtype: torch.dtype, peak: float | None
) -> None:
    backend = object.__new__(Cuda)
    backend.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    assert backend.peak_flops(dtype) == peak


def test_what_a_step_sends_to_a_gpu_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []

    def pin(x: Tensor) -> Tensor:
        done.append("pinned")
        return x

    def to(x: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
        done.append((torch.device(device).type, non_blocking))
        return x

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    sent(torch.zeros(2), torch.device("cuda", 0))
    sent(torch.zeros(2), "cpu")
    sent(torch.zeros(2, device="meta"), "cuda")
    assert done == ["pinned", ("cuda", True), ("cpu", True), ("cuda", True)]


def test_the_random_state_of_a_gpu_is_saved_behind_the_hosts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu, host = torch.device("cuda", 0), torch.get_rng_state()
    seed_and_offset, taken = torch.arange(16, dtype=torch.uint8), list[list[int]]()
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: seed_and_offset)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, _: taken.append(state.tolist()))
    saved = random_state(gpu)
    assert random_state(torch.device("cpu")).equal(host)
    for state, device in ((saved, "cpu"), (saved, "cuda:0"), (host, "cuda:0")):
        torch.manual_seed(5)
        set_random_state(state, torch.device(device))
        assert torch.get_rng_state().equal(host), device
    assert taken == [[*range(16)]], "no GPU, a GPU, a GPU without a state"
    with pytest.raises(TypeError):
        set_random_state(saved[:-1], gpu)


def test_sums_inside_products_are_wide_while_a_run_goes_on(gpus: SimpleNamespace) -> None:
    products = torch.backends.cuda.matmul
    before = [getattr(products, name) for name in NARROW_SUMS]
    with alone().joined(Mesh(), 1.0):
        assert not any(getattr(products, name) for name in NARROW_SUMS)
    assert [getattr(products, name) for name in NARROW_SUMS] == before == [True, True]
