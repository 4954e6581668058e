"""The memory of a NeuronCore, in the tree that the driver's documentation draws."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamax.backends import neuron_memory, xla
from llamax.parallel.rendezvous import Rendezvous

TOTAL = "stats/memory_usage/device_mem/total"


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three chips of two cores; core n uses (n + 1) GiB."""
    for core in range(6):
        path = tmp_path / f"neuron{core // 2}/neuron_core{core % 2}" / TOTAL
        path.parent.mkdir(parents=True)
        path.write_text(f"{(core + 1) << 30}\n")
    monkeypatch.setattr(neuron_memory, "DEVICES", tmp_path)
    return tmp_path


@pytest.mark.usefixtures("devices")
def test_bytes_of_each_core() -> None:
    found = [neuron_memory.used(core) for core in range(6)]
    assert found == [gib << 30 for gib in range(1, 7)]
    assert neuron_memory.used(6) is None


def test_where_nothing_is_shown(devices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (devices / "neuron0/neuron_core0" / TOTAL).write_text("")
    assert neuron_memory.used(0) is None
    monkeypatch.setattr(neuron_memory, "DEVICES", devices / "absent")
    assert neuron_memory.used(1) is None


@pytest.mark.parametrize(("variable", "core"), [("5", 5), ("4-7", 4), ("6,7", 6), ("", 3)])
def test_the_core_of_a_process(variable: str, core: int) -> None:
    assert neuron_memory.core({neuron_memory.VISIBLE: variable}, local_rank=3) == core
    assert neuron_memory.core({}, local_rank=3) == 3


def test_the_most_that_a_run_has_seen(devices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch-xla's own question is not asked: a plugin may answer it with an error."""
    monkeypatch.delenv(neuron_memory.VISIBLE, raising=False)
    backend = object.__new__(xla.Xla)
    backend.neuron, backend._most_memory = True, 0
    backend.rendezvous = Rendezvous(rank=35, world_size=64, local_rank=3, local_world_size=32)
    assert backend.memory() == 4 << 30
    path = devices / "neuron1/neuron_core1" / TOTAL
    path.write_text(f"{6 << 30}\n")
    assert backend.memory() == 6 << 30
    path.unlink()
    assert backend.memory() == 6 << 30
