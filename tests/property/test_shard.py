"""Cutting: join undoes cut, and ranks tile the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamax.parallel.sharding import (
    Block,
    Replica,
    Shard,
    cut,
    join,
    local_shape,
    parts,
    replicas,
    span,
)
from llamax.runtime.errors import ConfigError

DEGREES = (1, 2, 4, 8)


@st.composite
def blocks(draw: st.DrawFn, name: str = "") -> Block:
    """A block that all DEGREES can cut: units a multiple or a divisor of 8, or padded rows."""
    unit = draw(st.integers(1, 3))
    if draw(st.booleans()):
        return Block(draw(st.integers(1, 40)), name=name, pad=True)
    return Block(unit * draw(st.sampled_from((1, 2, 4, 8, 16, 24))), unit, name)


@st.composite
def shards(draw: st.DrawFn) -> tuple[Shard, torch.Tensor]:
    if draw(st.booleans()):
        names = ("q_proj", "k_proj", "v_proj")[: draw(st.integers(2, 3))]
        how = Shard(draw(st.integers(0, 1)), tuple(draw(blocks(name)) for name in names))
    else:
        how = Shard(draw(st.integers(0, 1)), (draw(blocks()),))
    shape = [3, 3]
    shape[how.dim] = sum(block.size for block in how.blocks)
    return how, torch.arange(shape[0] * shape[1]).reshape(shape)


@given(shards(), st.sampled_from(DEGREES))
def test_join_undoes_cut(case: tuple[Shard, torch.Tensor], degree: int) -> None:
    how, whole = case
    shares = [cut(whole, how, degree, rank) for rank in range(degree)]
    assert all(tuple(share.shape) == local_shape(whole.shape, how, degree) for share in shares)
    assert torch.equal(join(shares, how), whole)


@given(blocks(), st.sampled_from(DEGREES))
def test_spans_tile_the_block_once_per_replica(block: Block, degree: int) -> None:
    held = [0] * block.size
    for rank in range(degree):
        mine = span(block, degree, rank)
        assert mine.length + mine.pad == sum(span(block, degree, 0)[1:])
        for row in range(mine.start, mine.stop):
            held[row] += 1
    assert set(held) == {replicas(block, degree)}


@given(shards(), st.sampled_from(DEGREES))
def test_parts_are_the_hub_tensors_of_a_share(
    case: tuple[Shard, torch.Tensor], degree: int
) -> None:
    how, whole = case
    wholes = whole.split([block.size for block in how.blocks], how.dim)
    for rank in range(degree):
        share = cut(whole, how, degree, rank)
        found = list(parts("layers.0.self_attn.qkv_proj.weight", how, degree))
        assert sum(part.length for part in found) == share.shape[how.dim]
        for part, block, hub in zip(found, how.blocks, wholes, strict=True):
            middle = block.name or "qkv_proj"
            assert part.name == f"layers.0.self_attn.{middle}.weight"
            mine = share.narrow(how.dim, part.start, part.length)
            assert torch.equal(mine, cut(hub, part.how, degree, rank))


def test_a_replica_is_whole_everywhere() -> None:
    whole = torch.arange(6)
    assert torch.equal(cut(whole, Replica(), 4, 2), whole)
    assert torch.equal(join([whole, whole], Replica()), whole)
    assert local_shape((6,), Replica(), 4) == (6,)
    assert [part.name for part in parts("model.norm.weight", Replica(), 4)] == ["model.norm.weight"]


def test_a_head_that_would_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match="degree 4 neither divides nor is a multiple of the 6"):
        span(Block(24, unit=4, name="k_proj"), 4, 0)
