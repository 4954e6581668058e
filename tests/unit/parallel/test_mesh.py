"""The grid of ranks: a bijection, and groups that tile it, as neuronx-distributed lays them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamax.parallel.mesh import AXES, Mesh
from llamax.runtime.errors import ConfigError

degrees = st.integers(1, 4)
meshes = st.builds(Mesh, tp=degrees, dp=degrees, cp=degrees, pp=degrees)


@given(meshes)
def test_coordinates_are_a_bijection(mesh: Mesh) -> None:
    places = [mesh.coordinate(rank) for rank in range(mesh.world_size)]
    assert len(set(places)) == mesh.world_size
    assert [mesh.rank(place) for place in places] == list(range(mesh.world_size))


@given(meshes, st.sets(st.sampled_from(AXES)))
def test_groups_tile_the_world_and_differ_only_along_their_axes(mesh: Mesh, axes: set[str]) -> None:
    groups = mesh.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.world_size))
    for group in groups:
        assert list(group) == sorted(group)
        places = [mesh.coordinate(rank) for rank in group]
        for axis in AXES:
            values = {getattr(place, axis) for place in places}
            assert len(values) == (mesh.degree(axis) if axis in axes else 1)


def test_the_layout_is_that_of_neuronx_distributed() -> None:
    mesh = Mesh(tp=8, dp=8)
    assert mesh.groups("tp")[0] == tuple(range(8))
    assert mesh.groups("dp")[0] == (0, 8, 16, 24, 32, 40, 48, 56)


def test_replicas_are_neighbours_in_an_axis() -> None:
    assert Mesh(tp=4, dp=2).replicas("tp", 2) == ((0, 1), (2, 3), (4, 5), (6, 7))
    with pytest.raises(ValueError, match="do not tile"):
        Mesh(tp=4).replicas("tp", 3)


def test_fill_leaves_the_rest_to_the_data_axis() -> None:
    assert Mesh.fill(32, tp=8) == Mesh(tp=8, dp=4)
    for world, tp in ((6, 4), (2, 4), (0, 1)):
        with pytest.raises(ConfigError, match=f"a world of {world} ranks"):
            Mesh.fill(world, tp=tp)


def test_impossible_meshes_and_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="dp=0"):
        Mesh(dp=0)
    with pytest.raises(ValueError, match="outside a world of 2"):
        Mesh(dp=2).coordinate(2)
    with pytest.raises(ValueError, match="not among"):
        Mesh().groups("fsdp")


@pytest.mark.parametrize(("axis", "kind"), [("pp", "pipeline")])
def test_an_axis_that_cannot_train_is_refused(axis: str, kind: str) -> None:
    said = f"mesh degree {axis}=2: llamax does not have {kind} parallelism yet; use {axis}=1"
    with pytest.raises(ConfigError, match=said):
        Mesh.fill(4, **{axis: 2})
    with pytest.raises(ConfigError, match=said):
        Mesh(dp=2, **{axis: 2}).axes()


def test_context_ranks_are_next_to_the_tensor_ranks() -> None:
    mesh = Mesh.fill(8, tp=2, cp=2)
    assert mesh == Mesh(tp=2, cp=2, dp=2)
    groups = mesh.axes()
    assert groups["cp"] == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert groups["data"] == ((0, 2, 4, 6), (1, 3, 5, 7)), "context ranks in data rank order"
    placed = Mesh(tp=4, cp=2, dp=4).on_trn1()
    assert placed.groups("cp")[0] == (0, 1), "in a node"
