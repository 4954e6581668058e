"""Backends on torch.distributed: gloo on CPUs, neuron on trn2 and trn3; on GPUs ``cuda.py``."""

from __future__ import annotations

import itertools
import os
import re
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from llamax.backends import cpu
from llamax.backends.base import TRAINING, EagerDevice, Words
from llamax.backends.of_rank_0 import of_rank_0
from llamax.backends.torch_axes import GlooAxis, TorchAxis
from llamax.config.neuron_sdk import torchneuron_sdk
from llamax.parallel.collectives import Axes, Axis, Solo
from llamax.parallel.mesh import EDGES, Groups, Mesh
from llamax.parallel.network import interface, is_loopback, source_address
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.cores import cores, requested_threads
from llamax.runtime.errors import BackendError, LostRank, Stopped
from llamax.runtime.logging import logger
from llamax.runtime.units import count

WAITING_S = 30  # after which missing ranks are mentioned
POLL_S = 0.1  # between attempts to reach rank 0
NO_MEMORY = re.compile(r"[tT]ried to allocate ([\d.]+ \w+)")  # host and device memory
LAST_ERROR = "Last error:"  # nccl: what went wrong stands below
WORLDS = itertools.count()  # that this process has joined: the store of torchrun keeps old keys
Made = dict[tuple[int, ...], dist.ProcessGroup]


class TorchBackend(EagerDevice):
    """The process group and its axes, shared by all backends on torch.distributed."""

    name: str
    device: torch.device
    collectives: str
    axis: type[TorchAxis] = TorchAxis
    traces = False
    grace_s = 0.0  # by which a collective waits longer than ranks for each other

    def __init__(self, rendezvous: Rendezvous, words: Words = TRAINING) -> None:
        self.rendezvous, self.words = rendezvous, words

    @contextmanager
    def joined(self, mesh: Mesh, timeout_s: float) -> Iterator[Axes]:
        """The axes of ``mesh``, for as long as this rank is part of the world.

        Raises BackendError where the port is in use, other ranks do not join in time or memory runs
        out, and LostRank where a rank is lost later.
        """
        orderly = False
        try:
            yield self._join(mesh, timeout_s)
            orderly = True
        except (Stopped, SystemExit):  # all ranks leave together
            orderly = True
            raise
        except (dist.DistError, RuntimeError) as error:
            if explained := self._explained(error):
                raise explained from error
            raise
        finally:
            if dist.is_initialized():
                self._leave(orderly)

    def _explained(self, error: BaseException) -> BackendError | None:
        """What happened, in one line; None where it is no error of memory or of a connection."""
        who = f"rank {self.rendezvous.rank} of {self.rendezvous.world_size}"
        if refused := NO_MEMORY.search(str(error)):
            return BackendError(
                f"{who} was refused {refused[1]} of memory; use more ranks{self.words.less}"
            )
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            return LostRank(
                f"{who} lost the connection to another rank ({reason(error)}); see its message; "
                "start the job again to resume from its newest checkpoint"
            )
        return None

    def _leave(self, orderly: bool) -> None:
        """Leave the world; ``orderly``: as all ranks do."""
        dist.destroy_process_group()

    def _check_devices(self, store: Store) -> None:
        """Raise BackendError where ranks share a device; all ranks call it."""

    def _join(self, mesh: Mesh, timeout_s: float) -> Axes:
        rendezvous = self.rendezvous
        if rendezvous.world_size == 1:
            return Axes.solo(self.device)
        if rendezvous.one_machine:  # listen on the loopback only
            os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
        timeout, longest = (timedelta(seconds=timeout_s + more) for more in (0.0, self.grace_s))
        waiting = threading.Timer(WAITING_S, _say_what_is_waited_for, (rendezvous, timeout_s))
        waiting.daemon = True
        waiting.start()
        try:
            prefix = f"llamax/{rendezvous.attempt}/{next(WORLDS)}"
            store = PrefixStore(prefix, _store(rendezvous, timeout))
            if self.collectives == "gloo" and (network := _interface(rendezvous, store)):
                os.environ["GLOO_SOCKET_IFNAME"] = network
            self._check_devices(store)
            dist.init_process_group(
                self.collectives,
                store=store,
                rank=rendezvous.rank,
                world_size=rendezvous.world_size,
                timeout=longest,
            )
        except (dist.DistError, RuntimeError, OSError) as error:
            raise BackendError(
                f"rank {rendezvous.rank} of {rendezvous.world_size} could not join the others at "
                f"{rendezvous.address}:{rendezvous.port} ({reason(error)}); start every rank"
                f"{self.words.wait}{_network_hint(error)}"
            ) from error
        finally:
            waiting.cancel()
        made: Made = {}  # axes of the same ranks share one
        return Axes.of(mesh, rendezvous.rank, partial(self._axis, longest, made))

    def _axis(self, timeout: timedelta, made: Made, name: str, groups: Groups) -> Axis:
        ranks = next((group for group in groups if self.rendezvous.rank in group), ())
        if name in EDGES:
            # Some ranks have no edge, but all make all groups: torch names groups by their count.
            made = {pair: dist.new_group(list(pair), timeout=timeout) for pair in groups}
        if len(ranks) < 2:
            return Solo(name, self.device)
        if ranks not in made:
            group = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
            assert group is not None
            made[ranks] = group
        return self.axis(name, ranks, self.device, made[ranks])

    def compilations(self) -> int:
        return 0

    def host_reads(self) -> int:
        return 0

    def barrier(self) -> None:
        if dist.is_initialized():
            dist.barrier()

    def of_rank_0(self, name: str, value: int) -> int:
        return of_rank_0(self.rendezvous, name, value)


class Cpu(TorchBackend):
    """torch on CPUs; ``threads``: of a rank, 0 for OMP_NUM_THREADS or a share of the cores."""

    name, collectives, axis = "cpu", "gloo", GlooAxis
    device = torch.device("cpu")

    def __init__(self, rendezvous: Rendezvous, threads: int = 0, words: Words = TRAINING) -> None:
        super().__init__(rendezvous, words)
        share = max(1, cores() // rendezvous.local_world_size)
        torch.set_num_threads(threads or requested_threads() or share)
        cpu.keep_heap()

    def synchronize(self) -> None:
        """Does nothing: a CPU has no pending work."""

    def memory(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        return None  # a measurement varies with the load, so two runs could not be compared


class Neuron(TorchBackend):
    """torch on trn2 and trn3 by TorchNeuron, with a device and a process group named neuron.

    Importing ``torch_neuronx`` registers them; the package of the same name for trn1 has only XLA.
    Not yet executed on such a machine.  Source: AWS Neuron documentation, "How to use
    torch.distributed on Neuron" and "Guidelines for memory management" (SDK 2.33).
    """

    name, collectives = "neuron", "neuron"

    def __init__(self, rendezvous: Rendezvous, words: Words = TRAINING) -> None:
        super().__init__(rendezvous, words)
        if find_spec("torch_neuronx"):
            import_module("torch_neuronx")
        if not hasattr(torch, "neuron"):
            sdk = torchneuron_sdk().name
            raise BackendError(
                f"{words.backend('neuron')} needs TorchNeuron (Neuron SDK {sdk} or newer, on trn2 "
                "or trn3), which is not installed; on trn1 train and generate with backend xla"
            )
        cores = torch.accelerator.device_count()
        if cores != 1:  # 1: the launcher has assigned one to this process
            if rendezvous.local_world_size > cores:
                raise BackendError(
                    f"{words.backend('neuron')}: {count(rendezvous.local_world_size, 'rank')} on "
                    f"this machine and {count(cores, 'visible NeuronCore')}, but every rank needs "
                    "one; start fewer ranks"
                )
            torch.accelerator.set_device_index(rendezvous.local_rank)
        self.device = torch.device("neuron")

    def synchronize(self) -> None:
        torch.accelerator.synchronize()

    def memory(self) -> int:
        self.synchronize()  # the allocator counts completed work only
        return torch.accelerator.max_memory_allocated()

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        return None


def _store(rendezvous: Rendezvous, timeout: timedelta) -> Store:
    """The key-value store for the rendezvous; rank 0 serves it unless the launcher does."""
    port, world_size = rendezvous.port, rendezvous.world_size
    if rendezvous.agent_store or rendezvous.rank > 0:
        address = "127.0.0.1" if rendezvous.one_machine else rendezvous.address
        _wait_for_listener(address, port, timeout.total_seconds())
        return TCPStore(address, port, world_size, False, timeout, wait_for_workers=False)
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1" if rendezvous.one_machine else "", port))
        listener.listen(2 * world_size)
    except OSError as error:
        raise BackendError(
            f"port {port} on {rendezvous.address} cannot be opened ({error.strerror}); "
            "set MASTER_PORT to a free one"
        ) from error
    return TCPStore(
        "127.0.0.1",
        port,
        world_size,
        True,
        timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _wait_for_listener(address: str, port: int, timeout_s: float) -> None:
    """Wait until the store can be reached: torch prints a stack trace for each of its own attempts.

    Raises OSError, that of the last attempt, after ``timeout_s``.
    """
    end = time.monotonic() + timeout_s
    while True:
        left = max(end - time.monotonic(), POLL_S)
        try:
            with socket.create_connection((address, port), left) as reached:
                if reached.getsockname() != reached.getpeername():
                    return
                raise ConnectionRefusedError("nothing listens: the connection is to itself")
        except OSError:
            if time.monotonic() + POLL_S > end:
                raise
            time.sleep(POLL_S)


def _say_what_is_waited_for(rendezvous: Rendezvous, timeout_s: float) -> None:
    """Warn once on each machine that ranks are missing: nothing else is shown until the timeout."""
    if rendezvous.local_rank == 0 or (rendezvous.one_machine and rendezvous.local_rank == 1):
        served = rendezvous.rank == 0 or rendezvous.agent_store
        logger.warning(
            "rank %d of %d has waited %d s %s at %s:%d, and waits up to %d s; see whether every "
            "rank was started and this machine reaches that port",
            rendezvous.rank,
            rendezvous.world_size,
            WAITING_S,
            "for the other ranks" if served else "for rank 0",
            rendezvous.address,
            rendezvous.port,
            timeout_s,
        )


def _interface(rendezvous: Rendezvous, store: Store) -> str:
    """The network interface for gloo: the one by which this machine and rank 0's reach each other.

    gloo itself takes the address that the name of the machine resolves to, which Debian and Ubuntu
    write as 127.0.1.1 into /etc/hosts.  Where rank 0's machine reaches MASTER_ADDR by the loopback,
    for the same reason, it takes the interface by which it reaches another machine.  A variable
    GLOO_SOCKET_IFNAME is kept.
    """
    if given := os.environ.get("GLOO_SOCKET_IFNAME"):
        return given
    address = source_address(rendezvous.address)
    store.set(f"address/{rendezvous.rank}", address)
    if address and is_loopback(address):
        for rank in range(0, rendezvous.world_size, rendezvous.local_world_size):
            other = store.get(f"address/{rank}").decode()
            if other and not is_loopback(other):
                address = source_address(other)
                break
    return interface(address)


def _network_hint(error: BaseException) -> str:
    """What to do where gloo tried to reach another machine by its loopback."""
    if not re.search(r"remote=\[?127\.", str(error)):
        return ""
    return (
        ", or export GLOO_SOCKET_IFNAME, the network interface between the machines, because the "
        "name of a machine resolves to its loopback"
    )


def reason(error: BaseException) -> str:
    """The line of an error that says most."""
    first, _, last = str(error).partition(LAST_ERROR)
    lines = [*last.strip().splitlines(), *first.strip().splitlines(), type(error).__name__]
    return lines[0].strip()[:200]
