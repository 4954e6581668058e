"""neuronx-distributed's groups: the contract with a stand-in for its parallel_state."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from support.stand_ins import install_module

from llamax.backends import nxd
from llamax.parallel.mesh import Mesh
from llamax.runtime.errors import BackendError

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
            near = 32 // tp  # of LOCAL_WORLD_SIZE
            data = self.world_size // (tp * pp * cp)
            ranks = ranks.reshape(pp, data // near, cp, tp, near).transpose(-1, -2)
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
    install_module(monkeypatch, "neuronx_distributed.parallel_layers.parallel_state", **members)


@pytest.mark.parametrize(
    "mesh",
    [Mesh(tp=8, dp=8), Mesh(tp=32, dp=2), Mesh(tp=8, dp=2, pp=4), Mesh(tp=8, cp=4, dp=2)],
    ids=str,
)
def test_groups_contract(monkeypatch: pytest.MonkeyPatch, mesh: Mesh) -> None:
    """Contract: NxD gets the degrees by its names, holds the groups, and ours are the same."""
    state = ParallelState()
    install_nxd(monkeypatch, state)
    with nxd.shared_groups(mesh) as placed:
        for axis in ("tp", "dp", "pp", "cp"):
            assert {tuple(group) for group in state.groups[axis]} == set(mesh.groups(axis))
            assert placed.groups(axis) == mesh.groups(axis)
        assert placed.replicas("tp", 2) == mesh.replicas("tp", 2)
    assert not state.groups, "what was built here is taken down here"


def test_four_tensor_ranks_on_trn1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract: NxD's own example for 64 cores, tp 4."""
    install_nxd(monkeypatch, ParallelState())
    with nxd.shared_groups(Mesh(tp=4, dp=16)) as placed:
        tp, dp = placed.groups("tp"), placed.groups("dp", "cp")
    assert tp[:2] == ((0, 8, 16, 24), (1, 9, 17, 25))
    assert tp[8:10] == ((32, 40, 48, 56), (33, 41, 49, 57))
    assert dp[0] == (*range(8), *range(32, 40))
    assert dp[3] == (*range(24, 32), *range(56, 64))
    assert placed == Mesh(tp=4, dp=16).on_trn1(32)
    assert placed.replicas("tp", 2)[:2] == ((0, 8), (16, 24))
    assert [placed.rank(placed.coordinate(rank)) for rank in range(64)] == [*range(64)]


def test_degrees_that_nxd_cannot_place(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two stages of four tensor ranks on a node: NxD reshapes to zero data groups in a node."""
    monkeypatch.setattr(logging.getLogger("llamax"), "propagate", True)
    state = ParallelState(world_size=32)
    install_nxd(monkeypatch, state)
    mesh = Mesh(tp=4, pp=2, dp=4).on_trn1(32)
    with nxd.shared_groups(mesh) as same:
        assert same == mesh
    assert "cannot place tensor 4, context 1, pipeline 2, data 4 (shape '[2, 0" in caplog.text
    assert not state.groups


def test_groups_that_somebody_else_built(monkeypatch: pytest.MonkeyPatch) -> None:
    state = ParallelState()
    install_nxd(monkeypatch, state)
    state.initialize_model_parallel(8)
    with nxd.shared_groups(Mesh(tp=8, dp=8)) as placed:
        assert placed.groups("tp")[1] == tuple(range(8, 16))
    assert state.groups, "they stay"
    for other in (Mesh(tp=2, dp=32), Mesh(tp=8, dp=4)):
        with (
            pytest.raises(BackendError, match="initialize it with these degrees"),
            nxd.shared_groups(other),
        ):
            pass


def test_a_placeholder_is_not_nxd(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("llamax"), "propagate", True)
    install_module(monkeypatch, "neuronx_distributed")
    with nxd.shared_groups(Mesh(tp=2)) as same:
        assert same == Mesh(tp=2)
    assert "installed but cannot be imported" in caplog.text


def test_on_trn1_leaves_other_meshes() -> None:
    assert Mesh(tp=8, dp=4).on_trn1().order == ()
    assert Mesh(tp=4, dp=3).on_trn1().order == ()
    with pytest.raises(ValueError, match="does not place 4 ranks"):
        Mesh(tp=4, order=(0, 1, 2, 2))
