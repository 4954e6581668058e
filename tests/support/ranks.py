"""Ranks as threads of one process on torch-xla's CPU client, whose collectives really execute.

torch-xla's CPU client joins the devices of one process, not processes.  So ``run(4, fn, *args)``
starts a process with four CPU devices, and in it four threads, each the only user of its device,
that call ``fn(rank, *args)``.  Nothing in llamax knows: a thread sees its own device, ordinal and
world as a process on trn1 does.

Replicas meet only inside the *same* executable.  So at every ``torch_xla.sync`` they line up::

    rank 0   trace ... | compile, start |          | trace ...
    rank 1   trace ..... | wait         | start    | trace ...
    rank 2   trace ...   | wait           | start  | trace ...

and every rank after the first must find its program in the compilation cache: one that traced
another graph has its own, which is what would happen on Trainium, and is reported at once.  Between
these points nothing may execute, so a value that is read in the middle of a step is an error, not a
rank that waits for ever in a collective.

Replicas hang when they stand still, not when they are late: a compiler needs minutes on a machine
that does much else.  So no time by the clock is given; the process has hung when it used next to no
CPU time for ``STILL_S``, and its stacks are reported.  The client itself ends the process where a
replica comes to a collective 15 s after the first one, which no setting changes.  A machine that is
that busy is no fault of the replicas, so they start again, a few times; a replica that never comes
ends every attempt.
"""

from __future__ import annotations

import faulthandler
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from support.world import _module

os.environ["PJRT_DEVICE"] = "CPU"  # or torch_xla says on import that it chose so
PRELOAD = ["torch", "torch_xla", "pytest", "llamax.train", "support.world"]
STILL_S = 180.0  # by the clock, with less CPU time than the next line has
LEAST_S = 1.0  # the watch of Lockstep uses a fifth of it
LATE = "Termination timeout for"  # xla/service/rendezvous.cc
ATTEMPTS = 3


class ReplicaError(AssertionError):
    """A replica failed, hung, or traced a graph of its own."""


class LateError(ReplicaError):
    """A replica came to a collective when the client had given up on it."""


def run(size: int, fn: Callable[..., Any], *args: Any, stages: int = 1) -> list[Any]:
    """What ``fn(rank, *args)`` returns on ``size`` replicas, in rank order.

    ``fn`` is a function at the top level of a test module; arguments and results travel pickled.
    Of ``stages`` of a pipeline each has programs of its own, which its replicas share.
    """
    for _ in range(ATTEMPTS - 1):
        with suppress(LateError):
            return _run(size, fn, args, stages)
    return _run(size, fn, args, stages)


def _run(size: int, fn: Callable[..., Any], args: tuple[Any, ...], stages: int) -> list[Any]:
    """One attempt of ``run``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    here, there = context.Pipe()
    job = fn.__module__, os.path.abspath(fn.__code__.co_filename), fn.__qualname__, args
    stacks = tempfile.NamedTemporaryFile("r", prefix="stacks-")  # noqa: SIM115
    work = (size, there, pickle.dumps(job), stacks.name, stages)
    process = context.Process(target=_serve, args=work, daemon=True)
    process.start()
    there.close()
    try:
        used_s = 0.0
        while not here.poll(STILL_S):
            before_s, used_s = used_s, cpu_seconds(process.pid)
            if used_s < before_s + LEAST_S:
                where = f"stood still for {STILL_S:g} s, after {used_s:.0f} s of CPU time,"
                shown = threads(process.pid, Path(stacks.name))
                raise ReplicaError(f"{size} replicas {where} in {fn.__qualname__}\n{shown}")
        good, value = pickle.loads(here.recv_bytes())
    except EOFError:
        process.join(5)
        said = stacks.read()
        kind = LateError if LATE in said else ReplicaError
        raise kind(f"the replicas died, exit code {process.exitcode}\n{said}") from None
    finally:
        process.kill()
        process.join()
        here.close()
        stacks.close()
    if not good:
        raise ReplicaError(value)
    return list(value)


def cpu_seconds(pid: int | None) -> float:
    """The CPU time that a process has used; infinite if it has ended, as its pipe will say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return math.inf
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def threads(pid: int | None, stacks: Path) -> str:
    """Where the threads of a process are: Python stacks, the kernel's places, gdb's stacks."""
    assert pid is not None
    os.kill(pid, signal.SIGUSR1)
    late = time.monotonic() + 10
    while "(most recent call first)" not in stacks.read_text() and time.monotonic() < late:
        time.sleep(0.1)
    time.sleep(0.5)  # for the other threads
    lines = [stacks.read_text()]
    for task in sorted(Path(f"/proc/{pid}/task").iterdir()):
        name, place = ((task / file).read_text().strip() for file in ("comm", "wchan"))
        lines.append(f"thread {task.name} ({name}) in {place}")
    if gdb := shutil.which("gdb"):
        command = [gdb, "-p", str(pid), "-batch", "-ex", "thread apply all backtrace 30"]
        with suppress(subprocess.TimeoutExpired):
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            lines.append(done.stdout)
    return "\n".join(lines)


Answer = Callable[[bool, Any], None]


class Lockstep:
    """Lines replicas up where they hand a graph to the device."""

    def __init__(self, size: int, answer: Answer) -> None:
        self.size, self.answer = size, answer
        self.everybody = threading.Barrier(size)
        self.turn, self.changed = 0, threading.Condition()
        self.compiled: int | None = None  # all there should be, while a later rank has its turn

    def sync(self, wait: bool = False, reset_scope: bool = True) -> None:
        """What ``torch_xla.sync`` does, rank by rank."""
        import torch_xla
        import torch_xla.core.xla_model as xm
        import torch_xla.runtime as xr

        rank, device = xr.global_ordinal(), torch_xla._XLAC._xla_get_default_device()
        self.everybody.wait()
        with self.changed:
            self.changed.wait_for(lambda: self.turn == rank)
            torch_xla._XLAC._set_allow_execution(True)
            self.compiled = compilations() if rank else None
            torch_xla._XLAC._xla_step_marker(device, [], wait=False, reset_scope=reset_scope)
            torch_xla._XLAC._set_all_reduce_token(device, None)
            self.check()
            self.compiled = None
            self.turn = (rank + 1) % self.size
            torch_xla._XLAC._set_allow_execution(self.turn > 0 or self.size == 1)
            self.changed.notify_all()
        self.everybody.wait()  # every rank has started: its collectives can end
        if wait:
            xm.wait_device_ops([device])
        xm._run_step_closures()

    def check(self) -> None:
        """End where a later rank compiles: those before it wait in collectives that never end."""
        allowed, count = self.compiled, compilations()
        # Another thread may have gone on since, and what it compiled then is of no later rank.
        if allowed is not None and count > allowed and self.compiled == allowed:
            self.answer(False, f"rank {self.turn} traced another graph than rank 0")

    def watch(self) -> None:
        """Check also while that rank compiles, which can outlast the others' patience of 10 s."""
        while True:
            time.sleep(0.05)
            self.check()

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """``fn`` on every device; ``answer`` is told the first failure, or the results."""
        import torch_xla
        import torch_xla.core.xla_model as xm
        import torch_xla.runtime as xr
        from torch.distributed import HashStore
        from torch_xla._internal import pjrt

        from llamax.backends import of_rank_0
        from llamax.backends.xla import Xla

        store = HashStore()  # as of the process group, which threads cannot have
        of_rank_0._get_default_store = lambda: store  # type: ignore[attr-defined]
        torch_xla.sync = self.sync
        torch_xla._XLAC._set_allow_execution(self.size == 1 or isinstance(self, Lanes))
        Xla.barrier = lambda _: self.everybody.wait()  # type: ignore[assignment, method-assign]
        threading.Thread(target=self.watch, daemon=True).start()
        results: dict[int, Any] = {}

        def replica() -> None:
            rank = xr.global_ordinal()
            try:
                results[rank] = fn(rank, *args)
            except BaseException:
                self.answer(False, f"--- rank {rank} of {self.size}\n{traceback.format_exc()}")

        pjrt._run_thread_per_device(
            0,
            1,
            replica,
            lambda *_: xm.set_replication(torch_xla.device(), xm.get_xla_supported_devices()),
        )
        self.answer(True, [results[rank] for rank in range(self.size)])


LABEL = threading.local()  # ``now``: what a replica does, for those who count programs
PROGRAMS: list[tuple[int, str]] = []  # (rank, label) of each that was compiled in lanes


class Lanes(Lockstep):
    """Lines up the replicas that share the next program: those of a stage, or of several.

    ``LABEL.group`` is (name, ranks) of the replicas of stages that meet in a swap or a sum.
    One after the other they compile and start it, while no other group does: the client gives up on
    a collective after 10 s, so nobody may wait in one while its partner waits for a compilation.
    """

    def __init__(self, size: int, answer: Answer, stages: int) -> None:
        super().__init__(size, answer)
        self.each = size // stages
        self.launching, self.making = threading.Lock(), threading.Lock()
        self.barriers: dict[str, threading.Barrier] = {}

    def sync(self, wait: bool = False, reset_scope: bool = True) -> None:
        import torch_xla
        import torch_xla.core.xla_model as xm
        import torch_xla.runtime as xr

        device, rank = torch_xla._XLAC._xla_get_default_device(), xr.global_ordinal()
        first = rank - rank % self.each
        own = f"stage {first}", tuple(range(first, first + self.each))
        name, members = getattr(LABEL, "group", None) or own
        LABEL.group = None
        with self.making:
            barrier = self.barriers.setdefault(name, threading.Barrier(len(members)))
        xm.wait_device_ops(xm.xla_real_devices([device]))
        barrier.wait()
        if rank == members[0]:
            self.launching.acquire()
        for member in members:
            barrier.wait()
            if member != rank:
                continue
            before, self.turn = compilations(), rank
            self.compiled = None if rank == members[0] else before
            torch_xla._XLAC._xla_step_marker(device, [], wait=False, reset_scope=reset_scope)
            torch_xla._XLAC._set_all_reduce_token(device, None)
            self.check()
            self.compiled = None
            if compilations() > before:
                PROGRAMS.append((rank, getattr(LABEL, "now", "")))
        barrier.wait()
        if rank == members[0]:
            self.launching.release()
        xm._run_step_closures()


def compilations() -> int:
    """Programs that were not found in the cache; torch-xla counts before it compiles."""
    import torch_xla.debug.metrics as met

    return int(met.counter_value("UncachedCompile") or 0)


def _serve(size: int, pipe: Connection, job: bytes, stacks: str, stages: int) -> None:
    """The life of the process: its environment, its replicas, their results."""
    file = open(stacks, "w")  # noqa: SIM115
    os.dup2(file.fileno(), 2)  # also what the client says
    faulthandler.register(signal.SIGUSR1, file=2)
    threads = str(2 * size + 2)  # fewer than replicas and their collectives never meet
    os.environ |= {
        "PJRT_DEVICE": "CPU",
        "CPU_NUM_DEVICES": str(size),
        "PJRT_CPU_ASYNC_CLIENT": "0",
        "XLA_THREAD_POOL_SIZE": threads,
        "PJRT_NPROC": threads,
    }
    first = threading.Lock()

    def answer(good: bool, value: Any) -> None:
        """Say how it went, and end: after a failure other replicas are stuck in a collective."""
        data = pickle.dumps((good, value))
        first.acquire()
        pipe.send_bytes(data)
        os._exit(0)

    module, path, name, args = pickle.loads(job)
    try:
        lockstep = Lockstep(size, answer) if stages == 1 else Lanes(size, answer, stages)
        lockstep.run(getattr(_module(module, path), name), args)
    except BaseException:
        answer(False, traceback.format_exc())
