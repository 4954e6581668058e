"""Checks of the machine: devices, memory, limits, ports, network adapters, clock.

Sources: AWS Neuron, "Troubleshooting guide for torch-neuronx" and "EFA"; mallopt(3); Linux,
Documentation/networking/ip-sysctl; ntp_adjtime(3).
"""

from __future__ import annotations

import ctypes
import os
import resource
import socket
from collections.abc import Iterator

from llamax.config.hardware import GIB, Machine, memory_share
from llamax.runtime.units import show_bytes
from llamax.tools.doctor.finding import Finding, Host, passed, unknown

OPEN_FILES = 65535
ARENAS_PER_CPU = 8  # the limit of glibc on 64-bit machines
MANY_CPUS = 16
TIME_ERROR = 5  # <sys/timex.h>: the clock is not synchronized


def check(host: Host, expected: Machine, ports: list[int]) -> Iterator[Finding]:
    """The findings about this machine, which should be like ``expected``."""
    yield from devices(host, expected)
    yield from memory(host, expected)
    hard_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    yield from open_files(hard_files)
    yield from arenas(host, os.cpu_count() or 1)
    for port in ports:
        yield from port_reserved(host, port)
    yield from port_free(ports[0])
    yield from network(host, expected, resource.getrlimit(resource.RLIMIT_MEMLOCK)[1])
    yield from clock(_clock_state())


def devices_here(host: Host, expected: Machine) -> int:
    """The number of accelerators of the expected kind."""
    return host.gpus if expected.backend == "cuda" else host.neuron_devices


def devices(host: Host, expected: Machine) -> Iterator[Finding]:
    """The number of accelerators."""
    gpus, found = expected.backend == "cuda", devices_here(host, expected)
    kind = "GPU" if gpus else "Neuron device"
    if found == expected.devices:
        yield passed("devices", f"{found} {kind}s" if found else f"no {kind}, none needed")
    elif not found:
        yield unknown(
            "devices",
            f"no {kind} here; the job needs {expected.devices} on each node",
            "run doctor on a node",
        )
    else:
        yield Finding(
            "error",
            "devices",
            f"{found} {kind}s; the job needs {expected.devices}",
            "ranks without a device fail in the first step",
            f"{'nvidia-smi' if gpus else 'neuron-ls'}; restart the instance if it shows fewer than "
            "its type has",
        )


def memory(host: Host, expected: Machine) -> Iterator[Finding]:
    """Host memory: of the machine, or the limit of the control group."""
    words = (host.read("proc/meminfo") or "").split()
    if "MemTotal:" not in words:
        yield unknown("memory", "/proc/meminfo is not readable here", "run doctor on a node")
        return
    found = memory_share(1024 * int(words[words.index("MemTotal:") + 1]), host.root)
    if (host.neuron_devices or host.gpus) and found < 0.9 * expected.host_memory_gib * GIB:
        yield Finding(
            "warning",
            "memory",
            f"{show_bytes(found)} of host memory, but the instance has "
            f"{expected.host_memory_gib:.0f} GiB",
            "tracing, compiling and saving need host memory on every rank at the same time",
            "free it, or raise the container's memory limit",
        )
    else:
        yield passed("memory", f"{show_bytes(found)} of host memory")


def open_files(limit: int) -> Iterator[Finding]:
    """The limit on open files of a process."""
    if limit != resource.RLIM_INFINITY and limit < OPEN_FILES:
        yield Finding(
            "warning",
            "open files",
            f"at most {limit} open files",
            f"shards, sockets and compiler workers of a node need {OPEN_FILES}",
            f"echo '* hard nofile {OPEN_FILES}' | sudo tee /etc/security/limits.d/llamax.conf",
        )
    else:
        yield passed("open files", f"limit {'none' if limit < 0 else limit}")


def arenas(host: Host, cpus: int) -> Iterator[Finding]:
    """The number of malloc arenas that glibc may create."""
    setting = host.environ.get("MALLOC_ARENA_MAX")
    if setting is None and cpus > MANY_CPUS:
        yield Finding(
            "warning",
            "malloc",
            f"MALLOC_ARENA_MAX is not set, so glibc creates up to {ARENAS_PER_CPU * cpus} arenas",
            "tracing threads fill all of them, and host memory runs out after hours",
            "export MALLOC_ARENA_MAX=64; llamax launch does",
        )
    else:
        yield passed(
            "malloc", f"MALLOC_ARENA_MAX={setting}" if setting else f"{cpus} CPUs: few arenas"
        )


def port_reserved(host: Host, port: int) -> Iterator[Finding]:
    """Whether the kernel may assign ``port`` to an outgoing connection."""
    reserved = host.read("proc/sys/net/ipv4/ip_local_reserved_ports")
    span = host.read("proc/sys/net/ipv4/ip_local_port_range")
    if reserved is None or span is None:
        yield unknown("ports", "/proc/sys/net is not readable here", "run doctor on a node")
        return
    low, high = map(int, span.split())
    ranges = [part.split("-") for part in reserved.split(",") if part]
    if low <= port <= high and not any(int(part[0]) <= port <= int(part[-1]) for part in ranges):
        yield Finding(
            "warning",
            "ports",
            f"port {port} lies in {low}-{high}, which the kernel assigns to connections",
            "an outgoing connection may use it when the ranks rendezvous there",
            "sudo sysctl -w net.ipv4.ip_local_reserved_ports="
            f"{reserved + ',' if reserved else ''}{port}",
        )
    else:
        yield passed("ports", f"the kernel does not assign port {port}")


def port_free(port: int) -> Iterator[Finding]:
    """Whether nothing listens on ``port``."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            yield Finding(
                "warning",
                "port in use",
                f"port {port}: {error.strerror}",
                "rank 0 cannot wait for the others there",
                f"ss --listening --tcp --processes 'sport = {port}', or set another port",
            )
        else:
            yield passed("port in use", f"port {port} is free")


def network(host: Host, expected: Machine, memlock: int) -> Iterator[Finding]:
    """EFA adapters: their number, the right to lock memory, and their use by libfabric."""
    adapters = host.find("sys/class/infiniband", "*")
    if not expected.efa:
        yield passed("EFA", "no EFA adapter, none needed")
        return
    if not adapters:
        yield unknown(
            "EFA",
            f"no EFA adapter here; the instance has {expected.efa}",
            "run doctor on a node",
        )
        return
    if len(adapters) < expected.efa:
        yield Finding(
            "error",
            "EFA",
            f"{len(adapters)} EFA adapters; the instance has {expected.efa}",
            "sending gradients between nodes takes that much longer",
            "attach all interfaces of type efa in the launch template",
        )
    else:
        yield passed("EFA", f"{len(adapters)} adapters")
    if (provider := host.environ.get("FI_PROVIDER")) not in (None, "efa"):
        yield Finding(
            "error",
            "libfabric",
            f"FI_PROVIDER={provider}",
            "collectives would not use the EFA adapters",
            "unset FI_PROVIDER; llamax launch sets efa",
        )
    if memlock != resource.RLIM_INFINITY:
        yield Finding(
            "error",
            "memlock",
            f"at most {show_bytes(memlock)} of locked memory",
            "EFA locks the memory that it sends from",
            "echo '* - memlock unlimited' | sudo tee /etc/security/limits.d/efa.conf",
        )
    sent = sum(int(path.read_text()) for adapter in adapters for path in adapter.glob(TX_BYTES))
    if sent:
        yield passed("EFA traffic", f"{show_bytes(sent)} sent since the machine started")
    else:
        yield unknown(
            "EFA traffic", "nothing was sent over EFA yet", "run doctor again during training"
        )


TX_BYTES = "ports/*/hw_counters/tx_bytes"


def clock(state: int | None) -> Iterator[Finding]:
    if state is None:
        yield unknown(
            "clock", "the state of the clock is not readable here", "run doctor on a node"
        )
    elif state == TIME_ERROR:
        yield Finding(
            "warning",
            "clock",
            "the clock is not synchronized",
            "the times in the logs of nodes cannot be compared, and AWS credentials expire early",
            "sudo systemctl enable --now chrony || sudo systemctl enable --now chronyd",
        )
    else:
        yield passed("clock", "synchronized")


def _clock_state() -> int | None:
    """The result of ntp_adjtime: 0 to 4 synchronized, 5 not; None where it is unavailable."""
    try:
        adjust = ctypes.CDLL("libc.so.6").ntp_adjtime
    except (OSError, AttributeError):
        return None
    state = int(adjust(ctypes.create_string_buffer(512)))  # a struct timex of zeros changes nothing
    return state if state >= 0 else None
