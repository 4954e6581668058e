"""Contract tests: our adapters against stand-ins for packages that only a Neuron machine has.

Each stand-in has the names, arguments and layouts that neuronx_distributed 0.17 documents, or that
TorchNeuron's documentation gives, and computes with plain torch.  They show that llamax keeps the
contract as it was read; nothing here has run on Trainium.
"""

from __future__ import annotations

import importlib.machinery
import inspect
import logging
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llamax import ops
from llamax.backends import choose, nxd
from llamax.kernels.attention import nki_kernel
from llamax.parallel.mesh import Mesh
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import BackendError


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> ModuleType:
    """A module that can be found and imported under ``name``, and the packages above it."""
    parent, _, leaf = name.rpartition(".")
    if parent and parent not in sys.modules:
        install(monkeypatch, parent)
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    for member, value in members.items():
        setattr(module, member, value)
    monkeypatch.setitem(sys.modules, name, module)
    if parent:
        monkeypatch.setattr(sys.modules[parent], leaf, module, raising=False)
    return module


# --- attention -----------------------------------------------------------------------------------


def nki_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lnc: int = 1,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = True,
    mixed_precision: bool = True,
    seed: Tensor | None = None,
    hardware_type: object = None,
    transpose_nki_inputs: bool = True,
) -> Tensor:
    """q, k, v (batch, heads, head_dim, seq) with as many k as q heads -> (batch, heads, seq, d)."""
    assert q.shape == k.shape == v.shape, "the caller repeats key/value heads"
    assert q.shape[3] % 2048 == 0
    assert causal
    assert transpose_nki_inputs
    assert lnc == 1, "trn1"
    scale = softmax_scale or q.shape[-2] ** -0.5
    scores = torch.einsum("bhds,bhdt->bhst", q, k) * scale
    hidden = torch.ones(q.shape[3], q.shape[3], dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("bhst,bhdt->bhsd", weights, v)


@pytest.fixture
def neuron_core(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "torch_xla.runtime", device_type=lambda: "NEURON")
    install(
        monkeypatch,
        "neuronx_distributed.kernels.flash_attn",
        nki_flash_attn_func=nki_flash_attn_func,
    )
    nki_kernel.available.cache_clear()
    nki_kernel.tell.cache_clear()
    yield
    nki_kernel.available.cache_clear()


@pytest.mark.usefixtures("neuron_core")
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_flash_attention_contract(kv_heads: int) -> None:
    """Contract: layouts, repetition of key/value heads, gradients summed over the copies."""
    length = 2048
    shapes = ((1, length, 4, 3), (1, length, kv_heads, 3), (1, length, kv_heads, 3))
    ours = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    expected = ops.reference_attention(*ours, None)
    found = nki_kernel.attention(*theirs)
    assert found.shape == expected.shape
    dout = torch.randn_like(expected)
    expected.backward(dout)
    found.backward(dout)
    torch.testing.assert_close(found, expected)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(b.grad, a.grad)


def on_xla(length: int, width: int = 128) -> Any:
    return SimpleNamespace(device=SimpleNamespace(type="xla"), shape=(1, length, 8, width))


@pytest.mark.usefixtures("neuron_core")
def test_flash_attention_is_chosen_by_shape_and_refused_loudly(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("llamax"), "propagate", True)
    x = on_xla(4096)
    assert ops.kernel("attention", x, x, x, None) is nki_kernel.attention
    assert not caplog.records
    for q, documents, why in (
        (on_xla(2047), None, "sequence of 2047 is not a multiple of 2048"),
        (on_xla(2048, 256), None, "head_dim=256 is over 128"),
        (x, x, "documents are kept apart"),
    ):
        for _ in range(2):
            assert ops.kernel("attention", q, q, q, documents) is ops.traced_attention
        assert why in caplog.messages[-1]
    assert nki_kernel.tell.cache_info().misses == 3, "one line for each reason"


def test_nothing_changes_without_nxd(caplog: pytest.LogCaptureFixture) -> None:
    nki_kernel.available.cache_clear()
    x = on_xla(4096)
    assert ops.kernel("attention", x, x, x, None) is ops.traced_attention
    mesh = Mesh(tp=2, dp=2)
    with nxd.beside(mesh) as same:
        assert same is mesh
    assert not caplog.records
    assert "neuronx_distributed" not in sys.modules


@pytest.mark.usefixtures("neuron_core")
def test_flash_attention_is_for_neuron_cores_only(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "torch_xla.runtime", device_type=lambda: "CPU")
    nki_kernel.available.cache_clear()
    x = on_xla(4096)
    assert ops.kernel("attention", x, x, x, None) is ops.traced_attention


# --- groups --------------------------------------------------------------------------------------


class ParallelState:
    """``parallel_state`` for 64 cores: row-major [pp, dp, cp, tp], but tp 4 spread over a node."""

    def __init__(self, world_size: int = 64, trn1: bool = True) -> None:
        self.world_size, self.trn1, self.groups = world_size, trn1, {}

    def model_parallel_is_initialized(self) -> bool:
        return bool(self.groups)

    def initialize_model_parallel(
        self,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        context_parallel_size: int = 1,
        expert_model_parallel_size: int = 1,
        skip_collective_init: bool = False,
        lnc_size: int = 1,
        mesh_only: bool = False,
    ) -> None:
        tp, pp, cp = tensor_model_parallel_size, pipeline_model_parallel_size, context_parallel_size
        ranks = torch.arange(self.world_size)
        if self.trn1 and tp == 4:
            ranks = ranks.view(-1, 4, 8).transpose(1, 2)
        grid = ranks.reshape(pp, -1, cp, tp)
        self.groups = {
            axis: grid.movedim(dim, -1).reshape(-1, grid.shape[dim]).tolist()
            for dim, axis in enumerate(("pp", "dp", "cp", "tp"))
        }

    def destroy_model_parallel(self) -> None:
        self.groups = {}

    def get_tensor_model_parallel_replica_groups(self) -> list[list[int]]:
        return self.groups["tp"]

    def get_pipeline_model_parallel_replica_groups(self) -> list[list[int]]:
        return self.groups["pp"]

    def get_data_parallel_replica_groups(self) -> list[list[int]]:
        return self.groups["dp"]

    def get_context_model_parallel_replica_groups(self) -> list[list[int]]:
        return self.groups["cp"]


def install_nxd(monkeypatch: pytest.MonkeyPatch, state: ParallelState) -> None:
    members = {n: getattr(state, n) for n, _ in inspect.getmembers(state, inspect.ismethod)}
    install(monkeypatch, "neuronx_distributed.parallel_layers.parallel_state", **members)


@pytest.mark.parametrize(
    "mesh",
    [Mesh(tp=8, dp=8), Mesh(tp=32, dp=2), Mesh(tp=8, dp=2, pp=4), Mesh(tp=8, cp=4, dp=2)],
    ids=str,
)
def test_groups_contract(monkeypatch: pytest.MonkeyPatch, mesh: Mesh) -> None:
    """Contract: NxD gets the degrees by its names, holds the groups, and ours are the same."""
    state = ParallelState()
    install_nxd(monkeypatch, state)
    with nxd.beside(mesh) as placed:
        for axis in ("tp", "dp", "pp", "cp"):
            assert {tuple(group) for group in state.groups[axis]} == set(mesh.groups(axis))
            assert placed.groups(axis) == mesh.groups(axis)
        assert placed.replicas("tp", 2) == mesh.replicas("tp", 2)
    assert not state.groups, "what was built here is taken down here"


def test_four_tensor_ranks_on_trn1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract: NxD's own example for 64 cores, tp 4."""
    install_nxd(monkeypatch, ParallelState())
    with nxd.beside(Mesh(tp=4, dp=16)) as placed:
        tp, dp = placed.groups("tp"), placed.groups("dp", "cp")
    assert tp[:2] == ((0, 8, 16, 24), (1, 9, 17, 25))
    assert tp[8:10] == ((32, 40, 48, 56), (33, 41, 49, 57))
    assert dp[0] == (*range(8), *range(32, 40))
    assert dp[3] == (*range(24, 32), *range(56, 64))
    assert placed == Mesh(tp=4, dp=16).on_trn1(32)
    assert placed.replicas("tp", 2)[:2] == ((0, 8), (16, 24))
    assert [placed.rank(placed.coordinate(rank)) for rank in range(64)] == [*range(64)]


def test_groups_that_somebody_else_built(monkeypatch: pytest.MonkeyPatch) -> None:
    state = ParallelState()
    install_nxd(monkeypatch, state)
    state.initialize_model_parallel(8)
    with nxd.beside(Mesh(tp=8, dp=8)) as placed:
        assert placed.groups("tp")[1] == tuple(range(8, 16))
    assert state.groups, "they stay"
    for other in (Mesh(tp=2, dp=32), Mesh(tp=8, dp=4)):
        with (
            pytest.raises(BackendError, match="initialize it with these degrees"),
            nxd.beside(other),
        ):
            pass


def test_a_placeholder_is_not_nxd(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("llamax"), "propagate", True)
    install(monkeypatch, "neuronx_distributed")
    with nxd.beside(Mesh(tp=2)) as same:
        assert same == Mesh(tp=2)
    assert "installed but does not load" in caplog.text


def test_on_trn1_leaves_other_meshes() -> None:
    assert Mesh(tp=8, dp=4).on_trn1().order == ()
    assert Mesh(tp=4, dp=3).on_trn1().order == ()
    with pytest.raises(ValueError, match="does not place 4 ranks"):
        Mesh(tp=4, order=(0, 1, 2, 2))


# --- TorchNeuron ---------------------------------------------------------------------------------


def test_native_neuron_is_refused_in_one_line_where_it_is_absent() -> None:
    with pytest.raises(BackendError, match=r"needs TorchNeuron .* use run\.backend=xla$"):
        choose("neuron", Rendezvous())


def test_the_xla_package_of_that_name_is_not_it(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "torch_neuronx")
    with pytest.raises(BackendError, match="needs TorchNeuron"):
        choose("neuron", Rendezvous())


def test_native_neuron_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract: torch_neuronx registers device and process group "neuron"; torch.accelerator rules
    the cores."""
    calls: list[object] = []
    install(monkeypatch, "torch_neuronx")
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
        BackendError, match="5 ranks on this machine need a NeuronCore each but 4 are"
    ):
        choose("neuron", Rendezvous(rank=4, world_size=5, local_rank=4, local_world_size=5))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    choose("neuron", Rendezvous(rank=3, world_size=4, local_rank=3, local_world_size=4))
    assert calls == [2, "synchronize"], "a process that sees one core computes on that"
