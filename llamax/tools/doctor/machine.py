"""The machine: devices, memory, limits, ports, network adapters, clock.

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
from llamax.tools.doctor.finding import Finding, Host, ok, unseen

OPEN_FILES = 65535
ARENAS_A_CPU = 8  # glibc's own limit on 64-bit machines
MANY_CPUS = 16
TIME_ERROR = 5  # <sys/timex.h>: the clock is not synchronized


def check(host: Host, wanted: Machine, ports: list[int]) -> Iterator[Finding]:
    """Findings about this machine; ``wanted`` is what the job takes it for."""
    yield from devices(host, wanted)
    yield from memory(host, wanted)
    hard_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    yield from open_files(hard_files)
    yield from arenas(host, os.cpu_count() or 1)
    for port in ports:
        yield from reserved(host, port)
    yield from free(ports[0])
    yield from network(host, wanted, resource.getrlimit(resource.RLIMIT_MEMLOCK)[1])
    yield from clock(_clock_state())


def devices(host: Host, wanted: Machine) -> Iterator[Finding]:
    gpus = wanted.backend == "cuda"
    found, kind = (host.gpus, "GPU") if gpus else (host.neuron_devices, "Neuron device")
    if found == wanted.devices:
        yield ok("devices", f"{found} {kind}s" if found else f"no {kind}, none asked")
    elif not found:
        yield unseen(
            "devices",
            f"no {kind} here, where the job asks for {wanted.devices} a node",
            "run doctor on a node",
        )
    else:
        yield Finding(
            "error",
            "devices",
            f"{found} {kind}s, where the job asks for {wanted.devices}",
            "ranks without a device of their own fail at the first step",
            f"{'nvidia-smi' if gpus else 'neuron-ls'}; restart the instance if it shows fewer than "
            "it was sold with",
        )


def memory(host: Host, wanted: Machine) -> Iterator[Finding]:
    """Host memory: the machine's, or its control group's share of it."""
    words = (host.read("proc/meminfo") or "").split()
    if "MemTotal:" not in words:
        yield unseen("memory", "/proc/meminfo is not readable here", "run doctor on a node")
        return
    found = memory_share(1024 * int(words[words.index("MemTotal:") + 1]), host.root)
    if (host.neuron_devices or host.gpus) and found < 0.9 * wanted.host_memory_gib * GIB:
        yield Finding(
            "warning",
            "memory",
            f"{show_bytes(found)} of host memory, where it should have "
            f"{wanted.host_memory_gib:.0f} GiB",
            "tracing, compiling and saving take host memory on every rank at once",
            "free it, or raise the container's memory limit",
        )
    else:
        yield ok("memory", f"{show_bytes(found)} of host memory")


def open_files(limit: int) -> Iterator[Finding]:
    if limit != resource.RLIM_INFINITY and limit < OPEN_FILES:
        yield Finding(
            "warning",
            "open files",
            f"at most {limit} open files",
            f"shards, sockets and compiler workers of a node want {OPEN_FILES}",
            f"echo '* hard nofile {OPEN_FILES}' | sudo tee /etc/security/limits.d/llamax.conf",
        )
    else:
        yield ok("open files", f"limit {'none' if limit < 0 else limit}")


def arenas(host: Host, cpus: int) -> Iterator[Finding]:
    told = host.environ.get("MALLOC_ARENA_MAX")
    if told is None and cpus > MANY_CPUS:
        yield Finding(
            "warning",
            "malloc",
            f"MALLOC_ARENA_MAX is not set, so glibc makes up to {ARENAS_A_CPU * cpus} arenas",
            "tracing threads fill them all, and host memory runs out after hours",
            "export MALLOC_ARENA_MAX=64; llamax launch does",
        )
    else:
        yield ok("malloc", f"MALLOC_ARENA_MAX={told}" if told else f"{cpus} CPUs: few arenas")


def reserved(host: Host, port: int) -> Iterator[Finding]:
    """Whether the kernel may give ``port`` to a passing connection."""
    told = host.read("proc/sys/net/ipv4/ip_local_reserved_ports")
    span = host.read("proc/sys/net/ipv4/ip_local_port_range")
    if told is None or span is None:
        yield unseen("ports", "/proc/sys/net is not readable here", "run doctor on a node")
        return
    low, high = map(int, span.split())
    kept = [part.split("-") for part in told.split(",") if part]
    if low <= port <= high and not any(int(part[0]) <= port <= int(part[-1]) for part in kept):
        yield Finding(
            "warning",
            "ports",
            f"port {port} lies in {low}-{high}, which the kernel hands out",
            "any outgoing connection may hold it when ranks want to meet there",
            f"sudo sysctl -w net.ipv4.ip_local_reserved_ports={told + ',' if told else ''}{port}",
        )
    else:
        yield ok("ports", f"port {port} is not handed out by the kernel")


def free(port: int) -> Iterator[Finding]:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            yield Finding(
                "warning",
                "port in use",
                f"port {port}: {error.strerror}",
                "rank 0 cannot wait there for the others",
                f"ss --listening --tcp --processes 'sport = {port}', or another port in the job",
            )
        else:
            yield ok("port in use", f"port {port} is free")


def network(host: Host, wanted: Machine, memlock: int) -> Iterator[Finding]:
    """EFA adapters: there, allowed to pin memory, and chosen by libfabric."""
    adapters = host.find("sys/class/infiniband", "*")
    if not wanted.efa:
        yield ok("EFA", "no EFA adapter, none asked")
        return
    if not adapters:
        yield unseen(
            "EFA",
            f"no EFA adapter here, where an instance has {wanted.efa}",
            "run doctor on a node",
        )
        return
    if len(adapters) < wanted.efa:
        yield Finding(
            "error",
            "EFA",
            f"{len(adapters)} EFA adapters, where the instance has {wanted.efa}",
            "gradients between nodes take as much longer",
            "attach all interfaces of type efa in the launch template",
        )
    else:
        yield ok("EFA", f"{len(adapters)} adapters")
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
            "EFA pins the memory that it sends from",
            "echo '* - memlock unlimited' | sudo tee /etc/security/limits.d/efa.conf",
        )
    sent = sum(int(path.read_text()) for each in adapters for path in each.glob(TX_BYTES))
    if sent:
        yield ok("EFA traffic", f"{show_bytes(sent)} sent since the machine started")
    else:
        yield unseen("EFA traffic", "nothing was sent over EFA yet", "run doctor again in training")


TX_BYTES = "ports/*/hw_counters/tx_bytes"


def clock(state: int | None) -> Iterator[Finding]:
    if state is None:
        yield unseen("clock", "the kernel does not tell of its clock here", "run doctor on a node")
    elif state == TIME_ERROR:
        yield Finding(
            "warning",
            "clock",
            "the clock is not synchronized",
            "logs of nodes cannot be laid side by side, and credentials of AWS expire early",
            "sudo systemctl enable --now chrony || sudo systemctl enable --now chronyd",
        )
    else:
        yield ok("clock", "synchronized")


def _clock_state() -> int | None:
    """What ntp_adjtime says: 0 to 4 synchronized, 5 not."""
    try:
        adjust = ctypes.CDLL("libc.so.6").ntp_adjtime
    except (OSError, AttributeError):
        return None
    state = int(adjust(ctypes.create_string_buffer(512)))  # a struct timex of zeros: only ask
    return state if state >= 0 else None
