"""A pool of gloo ranks that outlives one test.

Starting a rank costs an ``import torch``, which takes seconds.  Here a fork server imports it once,
a ``World`` forks its ranks from that once per size, and then a test that wants ranks sends them a
message::

    pytest -- run(fn, *args) --> rank 0  -- fn(*args) -->  result, or the traceback
                             --> rank 1  ...

``fn`` is a function at the top level of a test module; arguments and results travel pickled.  Ranks
have one thread, torch's seed is 0 at the start of each call, and nothing leaves the loopback.
After an error the world is thrown away (ranks may be stuck half-way through a collective) and the
pool makes a new one for whoever asks next.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib.util
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

from llamax.parallel.collectives import Axes, Axis, Solo
from llamax.parallel.mesh import Groups, Mesh

PRELOAD = [
    "torch",
    "torch.distributed",
    "pytest",
    "llamax.backends.torch_distributed",
    "llamax.train",
]
MOST_S = 300.0  # a call of some seconds on a machine that does much else
GRACE_S = 5.0  # what the other ranks get to finish after one of them has failed


class WorldError(AssertionError):
    """A rank failed, died or hung; the message names it and shows where."""


class World:
    """``size`` ranks in one gloo process group, waiting for functions to run."""

    def __init__(self, size: int) -> None:
        self.size, self.alive = size, True
        self.folder = tempfile.TemporaryDirectory(prefix="world-")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, size, there, self._stacks(rank)),
                name=f"rank {rank} of {size}",
                daemon=True,
            )
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)
        port = pickle.loads(self.pipes[0].recv_bytes())
        for pipe in self.pipes[1:]:
            pipe.send_bytes(pickle.dumps(port))

    def run(self, fn: Callable[..., Any], *args: Any, timeout_s: float = MOST_S) -> list[Any]:
        """The results of ``fn(*args)`` on every rank, in rank order.

        Raises WorldError with the traceback of the ranks that failed, or the stack of those that
        are still running after ``timeout_s``.
        """
        path = os.path.abspath(fn.__code__.co_filename)
        job = pickle.dumps((fn.__module__, path, fn.__qualname__, args))
        for pipe in self.pipes:
            pipe.send_bytes(job)
        done: dict[int, Any] = {}
        failed: dict[int, str] = {}
        deadline = time.monotonic() + timeout_s
        while waiting := [r for r in range(self.size) if r not in done and r not in failed]:
            left = deadline - time.monotonic()
            ready = wait([self.pipes[rank] for rank in waiting], timeout=max(left, 0.0))
            if not ready:
                break
            for rank in waiting:
                if self.pipes[rank] not in ready:
                    continue
                try:
                    good, value = pickle.loads(self.pipes[rank].recv_bytes())
                except (EOFError, ConnectionResetError):
                    self.processes[rank].join(GRACE_S)
                    good, value = False, f"died, exit code {self.processes[rank].exitcode}"
                if good:
                    done[rank] = value
                else:
                    failed[rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if len(done) == self.size:
            return [done[rank] for rank in range(self.size)]
        hung = {rank: self._stack(rank) for rank in waiting}
        self.close(kill=True)
        raise WorldError(_report(fn.__qualname__, self.size, timeout_s, failed, hung))

    def close(self, kill: bool = False) -> None:
        """End the ranks; ``kill`` those that do not listen."""
        self.alive = False
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if kill:
                process.kill()
            elif process.is_alive():
                pipe.send_bytes(b"")
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            process.join(60)
            if process.is_alive():
                process.kill()
                process.join()
            pipe.close()
        self.folder.cleanup()

    def _stacks(self, rank: int) -> str:
        return os.path.join(self.folder.name, f"rank{rank}")

    def _stack(self, rank: int) -> str:
        """Where a rank is right now: its Python stack."""
        pid = self.processes[rank].pid
        assert pid is not None
        path = Path(self._stacks(rank))
        os.kill(pid, signal.SIGUSR1)
        late = time.monotonic() + GRACE_S
        while " in _serve\n" not in (text := path.read_text()) and time.monotonic() < late:
            time.sleep(0.02)
        return text.strip()


class Worlds:
    """The pool: ``worlds(4)`` is the world of four ranks, made when first asked for."""

    def __init__(self) -> None:
        self.by_size: dict[int, World] = {}

    def __call__(self, size: int) -> World:
        world = self.by_size.get(size)
        if world is None or not world.alive:
            world = self.by_size[size] = World(size)
        return world

    def close(self) -> None:
        for world in self.by_size.values():
            if world.alive:
                world.close()


@functools.cache
def axes(mesh: Mesh, kv: int = 0) -> Axes:
    """In a rank: the axes of ``mesh``, which fills the world; ``kv`` ranks, instead of the mesh's
    own number, share a key/value head."""
    import torch
    import torch.distributed as dist

    from llamax.backends.torch_axes import GlooAxis

    assert dist.get_world_size() == mesh.world_size, "the mesh fills the world"
    cpu = torch.device("cpu")

    def axis(name: str, groups: Groups) -> Axis:
        ranks = next((group for group in groups if dist.get_rank() in group), ())
        made = {group: _group(group) for group in groups if len(group) > 1}
        return GlooAxis(name, ranks, cpu, made[ranks]) if len(ranks) > 1 else Solo(name)

    return Axes.of(replace(mesh, kv=kv or mesh.kv), dist.get_rank(), axis)


@functools.cache
def _group(ranks: tuple[int, ...]) -> Any:
    """A process group of these ranks, one for all meshes: its threads wake 100 times a second.

    All ranks of the world call this in the same order, or torch names it differently on some.
    """
    import torch.distributed as dist

    return dist.new_group(list(ranks))


def _serve(rank: int, size: int, pipe: Connection, stacks: str) -> None:
    """The life of a rank."""
    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=False)
        store = _meet(rank, size, pipe)
        timeout = timedelta(hours=1)  # the pool, not gloo, decides what has hung
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
        while job := pipe.recv_bytes():
            try:
                module, path, name, args = pickle.loads(job)
                torch.manual_seed(0)
                result = pickle.dumps((True, getattr(_module(module, path), name)(*args)))
            except BaseException:
                result = pickle.dumps((False, traceback.format_exc()))
            pipe.send_bytes(result)
        dist.barrier()
        dist.destroy_process_group()


def _meet(rank: int, size: int, pipe: Connection) -> Any:
    """The store of the world, served by rank 0 on a loopback port that it sends by pipe."""
    import torch.distributed as dist

    timeout = timedelta(seconds=MOST_S)
    if rank:
        port = pickle.loads(pipe.recv_bytes())
        return dist.TCPStore("127.0.0.1", port, size, False, timeout, wait_for_workers=False)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(2 * size)
    port = listener.getsockname()[1]
    pipe.send_bytes(pickle.dumps(port))
    return dist.TCPStore(
        "127.0.0.1",
        port,
        size,
        True,
        timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _module(name: str, path: str) -> ModuleType:
    """The test module as pytest knows it, imported once per rank."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _report(
    name: str, size: int, timeout_s: float, failed: dict[int, str], hung: dict[int, str]
) -> str:
    lines: Sequence[str] = [
        *(f"--- rank {rank} of {size} failed in {name}\n{text}" for rank, text in failed.items()),
        *(
            f"--- rank {rank} of {size} "
            + ("was waiting" if failed else f"hung for {timeout_s:g} s")
            + f" in {name}\n{text}"
            for rank, text in hung.items()
        ),
    ]
    return "\n" + "\n".join(lines)
