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


def test_stages_swap_over_even_and_over_odd_edges() -> None:
    mesh = Mesh.fill(8, tp=2, pp=4)
    assert mesh == Mesh(tp=2, pp=4)
    groups = mesh.axes()
    assert groups["even"] == ((0, 2), (1, 3), (4, 6), (5, 7)), "stages 0 and 1, 2 and 3"
    assert groups["odd"] == ((2, 4), (3, 5)), "stages 1 and 2"
    assert groups["data"] == tuple((rank,) for rank in range(8)), "within a stage"


@pytest.mark.parametrize("stages", [3, 4, 5])
@pytest.mark.parametrize("axis", ["even", "odd"])
def test_every_rank_is_in_a_completed_pair(stages: int, axis: str) -> None:
    mesh = Mesh(tp=2, dp=2, pp=stages)
    real = mesh.axes()[axis]
    pairs = mesh.completed(real)
    assert pairs[: len(real)] == real
    assert sorted(rank for pair in pairs for rank in pair) == [*range(mesh.world_size)]
    assert {len(pair) for pair in pairs} == {2}


def test_two_stages_have_one_edge() -> None:
    assert Mesh(pp=2).axes()["even"] == ((0, 1),)
    assert "odd" not in Mesh(pp=2).axes()
    assert not {"even", "odd"} & Mesh(dp=2).axes().keys()


def test_context_ranks_are_next_to_the_tensor_ranks() -> None:
    mesh = Mesh.fill(8, tp=2, cp=2)
    assert mesh == Mesh(tp=2, cp=2, dp=2)
    groups = mesh.axes()
    assert groups["cp"] == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert groups["data"] == ((0, 2, 4, 6), (1, 3, 5, 7)), "context ranks in data rank order"
    placed = Mesh(tp=4, cp=2, dp=4).on_trn1()
    assert placed.groups("cp")[0] == (0, 1), "in a node"


def test_a_part_of_the_data_ranks_shares_what_zero_cuts() -> None:
    mesh = Mesh.fill(16, tp=2, cp=2, shard=4)
    assert (mesh.owners, mesh.copies) == (4, 2)
    groups = mesh.axes()
    assert groups["data"][0] == (0, 2, 4, 6, 8, 10, 12, 14)
    assert groups["shard"][:2] == ((0, 2, 4, 6), (8, 10, 12, 14)), "neighbours"
    assert groups["replica"][:2] == ((0, 8), (2, 10)), "the same place in each group"
    for name in ("shard", "replica"):
        assert sorted(rank for group in groups[name] for rank in group) == [*range(16)]


@pytest.mark.parametrize("shard", [0, 4])
def test_all_data_ranks_need_no_groups_of_their_own(shard: int) -> None:
    mesh = Mesh(tp=2, dp=4, shard=shard)
    assert (mesh.owners, mesh.copies) == (4, 1)
    assert not {"shard", "replica"} & mesh.axes().keys()


def test_groups_of_another_size_than_tiles_the_data_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="runs of 3 do not tile 4 data ranks"):
        Mesh(dp=4, shard=3)
