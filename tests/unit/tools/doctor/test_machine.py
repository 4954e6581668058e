"""The doctor on devices, memory, limits, ports and EFA."""

from __future__ import annotations

import resource
import socket
from pathlib import Path

import pytest
from support.hosts import host_with, levels, trainium
from support.tiny_run import free_port

from llamax.config.hardware import LOCAL, load_machine
from llamax.tools.doctor import Host, machine, versions

TRN1 = load_machine("trn1.32xlarge")


def test_a_machine_with_gpus(tmp_path: Path) -> None:
    p5 = load_machine("p5.48xlarge")
    assert levels(machine.devices(Host(tmp_path), p5)) == {"devices": "unknown"}
    for n in range(8):
        host_with(tmp_path, **{f"dev__nvidia{n}": ""})
    host_with(tmp_path, dev__nvidiactl="")
    assert levels(machine.devices(Host(tmp_path), p5)) == {"devices": "ok"}
    for line in ("Kernel Module  580.95.05  Wed", "Open Kernel Module for x86_64  580.95.05  R"):
        host = Host(tmp_path, packages={"torch": "2.9.0+cpu"})
        assert levels(versions.check(host, "cuda"))["torch"] == "error"
        host_with(tmp_path, proc__driver__nvidia__version=f"NVRM version: NVIDIA UNIX {line}\n")
        host = Host(tmp_path, packages={"torch": "2.9.0+cu130"})
        torch, driver = versions.check(host, "cuda")
        assert (torch.level, driver.what) == ("ok", "NVIDIA driver 580.95.05")
    (tmp_path / "dev" / "nvidia3").unlink()
    assert levels(machine.devices(host, p5)) == {"devices": "error"}


@pytest.mark.parametrize(
    ("driver", "packages", "level"),
    [
        ("570.133.20", {"torch": "2.9.0+cu130"}, "warning"),
        ("570.133.20", {"torch": "2.9.0+cu128"}, "ok"),
        ("570.133.20", {"torch": "2.13.0", "nvidia-cuda-runtime": "13.0.96"}, "warning"),
        ("515.105.01", {"torch": "2.9.0", "nvidia-cuda-runtime-cu12": "12.8.90"}, "warning"),
        ("515.105.01", {"torch": "2.9.0"}, "ok"),
    ],
)
def test_a_driver_older_than_cuda_is_found(
    tmp_path: Path, driver: str, packages: dict[str, str], level: str
) -> None:
    line = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Wed\n"
    host_with(tmp_path, proc__driver__nvidia__version=line)
    found = levels(versions.check(Host(tmp_path, packages=packages), "cuda"))
    assert found["driver"] == level


def test_devices_and_memory(tmp_path: Path) -> None:
    host = trainium(tmp_path)
    assert levels(machine.devices(host, TRN1)) == {"devices": "ok"}
    assert levels(machine.devices(Host(tmp_path / "no"), TRN1)) == {"devices": "unknown"}
    assert levels(machine.devices(Host(tmp_path / "no"), LOCAL)) == {"devices": "ok"}
    (tmp_path / "dev" / "neuron3").unlink()
    assert levels(machine.devices(host, TRN1)) == {"devices": "error"}
    assert levels(machine.memory(host, TRN1)) == {"memory": "unknown"}
    host_with(tmp_path, proc__meminfo=f"MemTotal: {510 * 2**20} kB\n")
    assert levels(machine.memory(host, TRN1)) == {"memory": "ok"}
    host_with(tmp_path, **{"sys__fs__cgroup__memory.max": str(64 * 2**30)})
    assert levels(machine.memory(host, TRN1)) == {"memory": "warning"}


def test_limits() -> None:
    assert levels(machine.open_files(1024)) == {"open files": "warning"}
    assert levels(machine.open_files(65535)) == {"open files": "ok"}
    assert levels(machine.open_files(resource.RLIM_INFINITY)) == {"open files": "ok"}
    assert levels(machine.arenas(Host(), 128)) == {"malloc": "warning"}
    assert levels(machine.arenas(Host(environ={"MALLOC_ARENA_MAX": "64"}), 128)) == {"malloc": "ok"}
    assert levels(machine.arenas(Host(), 4)) == {"malloc": "ok"}
    assert levels(machine.clock(5)) == {"clock": "warning"}
    assert levels(machine.clock(0)) == {"clock": "ok"}
    assert levels(machine.clock(None)) == {"clock": "unknown"}


@pytest.mark.parametrize(
    ("kept", "span", "level"),
    [
        ("", "32768\t60999", "ok"),
        ("", "1024\t65000", "warning"),
        ("29000-29600,62182", "1024\t65000", "ok"),
        ("29501", "1024\t65000", "warning"),
    ],
)
def test_ports_that_the_kernel_hands_out(tmp_path: Path, kept: str, span: str, level: str) -> None:
    host = host_with(
        tmp_path,
        proc__sys__net__ipv4__ip_local_reserved_ports=kept,
        proc__sys__net__ipv4__ip_local_port_range=span,
    )
    (found,) = machine.port_reserved(host, 29500)
    assert found.level == level
    if kept == "29501":
        assert found.fix.endswith("=29501,29500")
    assert levels(machine.port_reserved(Host(tmp_path / "no"), 29500)) == {"ports": "unknown"}


def test_a_port_in_use_is_found() -> None:
    with socket.socket() as held:
        held.bind(("", port := free_port()))
        held.listen()
        assert levels(machine.port_free(port)) == {"port in use": "warning"}
    assert levels(machine.port_free(port)) == {"port in use": "ok"}


def test_efa(tmp_path: Path) -> None:
    unlimited = resource.RLIM_INFINITY
    assert levels(machine.network(Host(tmp_path), LOCAL, 0)) == {"EFA": "ok"}
    assert levels(machine.network(Host(tmp_path), TRN1, unlimited)) == {"EFA": "unknown"}
    for n in range(8):
        path = tmp_path / f"sys/class/infiniband/rdmap{n}/ports/1/hw_counters/tx_bytes"
        path.parent.mkdir(parents=True)
        path.write_text("0\n")
    host = Host(tmp_path, environ={"FI_PROVIDER": "efa"})
    found = levels(machine.network(host, TRN1, unlimited))
    assert found == {"EFA": "ok", "EFA traffic": "unknown"}
    path.write_text("12345\n")
    assert levels(machine.network(host, TRN1, unlimited))["EFA traffic"] == "ok"
    tcp = Host(tmp_path, environ={"FI_PROVIDER": "tcp"})
    found = levels(machine.network(tcp, TRN1, 65536))
    assert (found["libfabric"], found["memlock"]) == ("error", "error")
    more = load_machine("trn1n.32xlarge")
    assert levels(machine.network(host, more, unlimited))["EFA"] == "error"
