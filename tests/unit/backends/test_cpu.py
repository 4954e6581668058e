"""The heap and the rate of a CPU."""

import ctypes
import os
import resource
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from support.tiny_run import free_port

from llamax import ops
from llamax.backends import cpu, torch_distributed
from llamax.backends.torch_distributed import Cpu, _network_hint
from llamax.parallel.mesh import Mesh
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import BackendError
from llamax.runtime.process import NO_CACHE

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc

FAULTS = """
import ctypes, resource, sys
from llamax.backends import cpu, torch_distributed
if sys.argv[1] == "keep":
    assert cpu.keep_heap()
if "unmap large" in sys.argv:
    cpu.unmap_large_blocks()
size = 40 << 20
if "bound" in sys.argv:
    cpu.bound_heap()
    size = 1 << 20
libc = ctypes.CDLL(None)
libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: one fault for each page, on every machine
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*modes: str) -> int:
    command = [sys.executable, "-c", FAULTS, *modes]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_kept_heap_is_faulted_in_once() -> None:
    pages = (40 << 20) // resource.getpagesize()
    assert faults("leave") >= 5 * pages
    assert faults("keep") < 2 * pages
    assert faults("keep", "unmap large") >= 5 * pages
    assert faults("keep", "bound") >= 5 * (1 << 20) // resource.getpagesize()


SMALL = """
import ctypes
from llamax.backends import cpu, torch_distributed
cpu.keep_heap()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
class Info(ctypes.Structure):  # mallinfo2 of malloc.h
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
libc.mallinfo2.restype = Info
for block in [libc.malloc(40) for _ in range(1000)]:
    libc.free(block)
print(libc.mallinfo2().fsmblks)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_small_freed_blocks_join_their_neighbours() -> None:
    environment = {**os.environ, "GLIBC_TUNABLES": NO_CACHE}
    command = [sys.executable, "-c", SMALL]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) == 0, "bytes of blocks that do not join others"


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert not cpu.keep_heap()
    cpu.unmap_large_blocks()
    cpu.bound_heap()


def test_older_glibc_takes_a_smaller_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Old:
        @staticmethod
        def mallopt(option: int, size: int) -> int:
            asked.append((option, size))
            return int(option == M_TRIM_THRESHOLD or size <= 32 << 20)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Old)
    assert cpu.keep_heap()
    assert (M_MMAP_THRESHOLD, 32 << 20) in asked


def test_peak_is_measured_once_a_number_of_threads() -> None:
    first = cpu.measure_peak_flops(torch.float32)
    assert first > 1e8
    assert cpu.measure_peak_flops(torch.float32) == first
    if not ops.has_bf16_units():
        assert cpu.measure_peak_flops(torch.bfloat16) == first


def test_memory_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "keep_heap", lambda: True)  # the tests' own heap stays as it is
    says = r"rank 0 of 1 was refused 4503599627370496 bytes of memory; use more ranks, a smaller"
    with (
        pytest.raises(BackendError, match=says),
        Cpu(Rendezvous(), threads=1).joined(Mesh(), timeout_s=1),
    ):
        torch.empty(1 << 50)
    with pytest.raises(RuntimeError, match="shape"), Cpu(Rendezvous(), 1).joined(Mesh(), 1):
        torch.empty(3).view(2)


@pytest.mark.parametrize(
    ("where", "waits"),
    [
        (Rendezvous(0, 2, 0, 1), "rank 0 of 2 has waited 0 s for the other ranks at 127.0.0.1:"),
        (Rendezvous(1, 2, 0, 1), "rank 1 of 2 has waited 0 s for rank 0 at 127.0.0.1:"),
        (Rendezvous(1, 2, 1, 2), "rank 1 of 2 has waited 0 s for rank 0 at 127.0.0.1:"),
        (Rendezvous(3, 4, 1, 2), ""),  # the first rank of its machine says it
    ],
)
def test_ranks_that_are_missing_are_mentioned_before_the_timeout(
    where: Rendezvous,
    waits: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch_distributed, "WAITING_S", 0.01)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "lo")  # what joining sets is undone
    alone = replace(where, port=free_port())
    mesh = Mesh.fill(where.world_size)
    with (
        pytest.raises(BackendError, match=rf"rank {where.rank} of .* could not join the others"),
        Cpu(alone, threads=1).joined(mesh, timeout_s=1),
    ):
        pass
    said = [record.getMessage() for record in caplog.records if record.name == "llamax"]
    assert [line[: len(waits)] for line in said] == ([waits] if waits else [])
    assert "frame #" not in capfd.readouterr().err, "a stack trace of torch"


def test_a_rank_waits_until_rank_0_listens() -> None:
    listener, port = socket.socket(), free_port()

    def listen() -> None:
        listener.bind(("127.0.0.1", port))
        listener.listen()

    late = threading.Timer(0.3, listen)
    late.start()
    torch_distributed._wait_for_listener("127.0.0.1", port, 300)
    late.join()
    listener.close()


def test_a_connection_to_itself_is_no_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel makes one where it gives the client the very port that nobody listens at."""

    def itself(address: tuple[str, int], _timeout_s: float) -> socket.socket:
        joined = socket.socket()
        joined.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        joined.bind(address)
        joined.connect(address)
        return joined

    monkeypatch.setattr(socket, "create_connection", itself)
    with pytest.raises(OSError, match="nothing listens"):
        torch_distributed._wait_for_listener("127.0.0.1", free_port(), 0.05)


def test_a_peer_on_the_loopback_is_explained() -> None:
    refused = RuntimeError("SO_ERROR: Connection refused, remote=[127.0.1.1]:1942$1)")
    assert "export GLOO_SOCKET_IFNAME, the network interface" in _network_hint(refused)
    assert _network_hint(RuntimeError("Connection refused, remote=[10.0.0.1]:1942")) == ""
