"""TorchNeuron's native device: absent in one line, and the contract with a stand-in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.stand_ins import install_module

from llamax.backends import choose
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import BackendError

# --- TorchNeuron ---------------------------------------------------------------------------------


def test_native_neuron_is_refused_in_one_line_where_it_is_absent() -> None:
    with pytest.raises(BackendError, match=r"needs TorchNeuron .* with backend xla$"):
        choose("neuron", Rendezvous())


def test_the_xla_package_of_that_name_is_not_it(monkeypatch: pytest.MonkeyPatch) -> None:
    install_module(monkeypatch, "torch_neuronx")
    with pytest.raises(BackendError, match="needs TorchNeuron"):
        choose("neuron", Rendezvous())


def test_native_neuron_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract: torch_neuronx registers device and process group "neuron"; torch.accelerator rules
    the cores."""
    calls: list[object] = []
    install_module(monkeypatch, "torch_neuronx")
    monkeypatch.setattr(torch, "neuron", SimpleNamespace(), raising=False)
    monkeypatch.setattr(torch, "device", lambda *name: name)  # "neuron" is unknown to this torch
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(torch.accelerator, "set_device_index", calls.append)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: calls.append("synchronize"))
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda: 7)
    backend = choose("neuron", Rendezvous(rank=6, world_size=8, local_rank=2, local_world_size=4))
    assert (backend.name, backend.collectives, backend.device) == ("neuron", "neuron", ("neuron",))
    assert calls == [2]
    assert backend.memory() == 7
    assert calls == [2, "synchronize"]
    assert backend.peak_flops(torch.bfloat16) is None
    with pytest.raises(
        BackendError, match="5 ranks on this machine and 4 visible NeuronCores, but every"
    ):
        choose("neuron", Rendezvous(rank=4, world_size=5, local_rank=4, local_world_size=5))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    choose("neuron", Rendezvous(rank=3, world_size=4, local_rank=3, local_world_size=4))
    assert calls == [2, "synchronize"], "a process that sees one core computes on that"
