"""What the xla backend decides before torch-xla is imported: it needs no torch-xla."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from llamax.backends import choose, of_rank_0, xla, xla_install
from llamax.config.hardware import load_machine
from llamax.parallel.mesh import Mesh
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import BackendError


@pytest.mark.parametrize(
    ("torch_xla", "torch_version", "message"),
    [
        (None, "2.9.0", "needs torch-xla, which is not installed"),
        ("2.8.1", "2.8.0", "needs torch-xla 2.9 but 2.8.1 is installed"),
        ("2.9.0", "2.13.0+cpu", "torch-xla 2.9.0 needs torch 2.9 but 2.13.0+cpu is installed"),
    ],
)
def test_versions_that_do_not_fit(torch_xla: str | None, torch_version: str, message: str) -> None:
    with pytest.raises(BackendError) as caught:
        xla_install.check(torch_xla, torch_version)
    line = str(caught.value)
    assert message in line
    assert "install torch==2.9.0 and torch-xla==2.9.0, or use run.backend=cpu" in line
    assert "\n" not in line


def test_versions_that_fit() -> None:
    xla_install.check("2.9.0", "2.9.0+cu128")
    xla_install.check("2.9.0+gitabc", "2.9.1")


@pytest.mark.skipif(xla_install.installed("torch-xla") is not None, reason="torch-xla is installed")
def test_choose_without_torch_xla() -> None:
    with pytest.raises(BackendError, match="torch-xla"):
        choose("xla", Rendezvous())


@pytest.fixture
def fitting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla_install, "installed", lambda _: "2.9.0")
    monkeypatch.setattr(torch, "__version__", "2.9.0")


@pytest.mark.usefixtures("fitting")
@pytest.mark.parametrize("name", xla_install.DEPRECATED)
def test_a_downcast_of_everything_is_refused(name: str) -> None:
    with pytest.raises(BackendError, match=f"{name}=1 would turn float32 masters into bfloat16"):
        xla_install.configure({name: "1"}, Rendezvous(), False)


@pytest.mark.usefixtures("fitting")
def test_a_neuron_device_without_its_driver_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(xla_install, "NEURON_DEVICE", tmp_path)
    with pytest.raises(BackendError, match="torch-neuronx, which it needs, is not installed"):
        xla_install.configure({}, Rendezvous(), False)


@pytest.mark.usefixtures("fitting")
@pytest.mark.parametrize(("device", "package"), [("CPU", "torch_xla"), ("NEURON", "torch_neuronx")])
def test_what_does_not_import_is_named(
    monkeypatch: pytest.MonkeyPatch, device: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendError, match=f"{package} cannot be imported"):
        xla_install.configure({"PJRT_DEVICE": device}, Rendezvous(), False)


@pytest.mark.usefixtures("fitting")
@pytest.mark.parametrize("rounding", [False, True])
def test_rounding_is_set_for_neuron_cores(monkeypatch: pytest.MonkeyPatch, rounding: bool) -> None:
    for package in ("torch_neuronx", "torch_xla"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    environ = {"PJRT_DEVICE": "NEURON"}
    assert xla_install.configure(environ, Rendezvous(rank=1, world_size=2), rounding)
    assert environ["NEURON_RT_STOCHASTIC_ROUNDING_EN"] == str(int(rounding))
    assert environ["RANK"] == "1"


@pytest.mark.usefixtures("fitting")
@pytest.mark.parametrize("device", ["CPU", "NEURON"])
def test_views_are_sound_on_every_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The variable is set before torch-neuronx is imported, which keeps it."""
    for package in ("torch_neuronx", "torch_xla"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    for environ in (
        {"PJRT_DEVICE": device},
        {"PJRT_DEVICE": device, xla_install.UNSOUND_VIEWS: "1"},
    ):
        xla_install.configure(environ, Rendezvous(), False)
        assert environ[xla_install.UNSOUND_VIEWS] == "0"


def test_ranks_meet_on_the_host() -> None:
    store = dist.HashStore()
    late = threading.Event()

    def first() -> None:
        of_rank_0.wait_for_all(store, "here", 2)
        late.set()

    thread = threading.Thread(target=first)
    thread.start()
    assert not late.wait(0.2), "it waits for the second"
    of_rank_0.wait_for_all(store, "here", 2)
    thread.join(10)
    assert late.is_set()


@pytest.mark.parametrize(("mesh", "sums"), [(Mesh(dp=2), 0), (Mesh(pp=2), 1)], ids=str)
def test_stages_begin_collectives_together(
    monkeypatch: pytest.MonkeyPatch, mesh: Mesh, sums: int
) -> None:
    """On NeuronCores, before anything else; others begin with the same program anyway."""
    begun: list[object] = []
    monkeypatch.setattr(xla, "axes", lambda *_: SimpleNamespace(world="the world"))
    monkeypatch.setattr(xla, "begin_collectives", lambda world, _: begun.append(world))
    backend = object.__new__(xla.Xla)
    backend.neuron, backend.device = True, torch.device("cpu")
    backend.rendezvous = Rendezvous(world_size=2, local_world_size=2)
    with backend.joined(mesh, 1.0):
        assert begun == ["the world"] * sums


def test_neuron_cores_are_rated_by_the_table_and_the_cpu_client_is_not() -> None:
    backend = object.__new__(xla.Xla)
    backend.neuron = True
    trn1 = load_machine("trn1.32xlarge")
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32")):
        assert backend.peak_flops(dtype) == trn1.peak_flops(name)
    backend.neuron = False
    assert backend.peak_flops(torch.bfloat16) is None
