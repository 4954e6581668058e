"""Flat vectors, buckets, runs: they tile, and the norm counts each element of the whole once."""

from __future__ import annotations

from fractions import Fraction
from math import prod
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from llamax.config.schema import OptimConfig
from llamax.optim import Zero
from llamax.optim.buckets import buckets, padded, pieces, segments, shared_spans, weight
from llamax.parallel.collectives import Axes, Solo
from llamax.parallel.sharding import (
    Block,
    Cut,
    Replica,
    Shard,
    ShardedParameter,
    ShardedParameters,
    cut,
    local_shape,
    replicas,
)

DEGREES = st.sampled_from([1, 2, 3, 4, 6, 8])


class Seat(Solo):
    """One rank's place on a larger axis, for what is built before anything is sent."""

    def __init__(self, name: str, size: int, rank: int) -> None:
        super().__init__(name)
        self.size, self.rank = size, rank


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], Cut, int]:
    """(whole shape, cut, degree): plain, fused with replicated heads, padded, replicas."""
    degree = draw(DEGREES)
    other = draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["replica", "plain", "heads", "padded"]))
    if kind == "replica":
        return (draw(st.integers(1, 9)), other), Replica(), degree
    dim = draw(st.integers(0, 1))
    unit = draw(st.integers(1, 3))
    if kind == "plain":
        blocks: tuple[Block, ...] = (Block(degree * unit),) * draw(st.integers(1, 2))
    elif kind == "padded":
        blocks = (Block(draw(st.integers(1, 30)), pad=True),)
    else:
        heads = draw(st.sampled_from([k for k in range(1, degree + 1) if degree % k == 0]))
        kv = Block(heads * unit, unit)
        blocks = (Block(degree * unit, unit), kv, kv)
    rows = sum(block.size for block in blocks)
    return (rows, other) if dim == 0 else (other, rows), Shard(dim, blocks), degree


@given(cuts())
def test_the_norm_counts_every_element_once(case: tuple[tuple[int, ...], Cut, int]) -> None:
    shape, how, degree = case
    whole = torch.arange(prod(shape)).view(shape)
    local = local_shape(shape, how, degree)
    counted = [Fraction(0)] * whole.numel()
    for rank in range(degree):
        share, offset = cut(whole, how, degree, rank).flatten(), 0
        assert share.numel() == prod(local)
        for segment in segments(local, how, degree, rank):
            for element in share[offset : offset + segment.length].tolist():
                counted[element] += Fraction(segment.weight).limit_denominator(64)
            offset += segment.length
        assert offset == share.numel()
    assert counted == [1] * whole.numel()


@given(cuts())
def test_a_group_has_one_weight_or_none_and_the_same_parts_on_all_ranks(
    case: tuple[tuple[int, ...], Cut, int],
) -> None:
    shape, how, degree = case
    local = local_shape(shape, how, degree)
    every = [segments(local, how, degree, rank) for rank in range(degree)]
    weights = {segment.weight for rank in every for segment in rank}
    assert weight(how, degree) == (weights.pop() if len(weights) == 1 else None)
    spans = {tuple(shared_spans(rank, 0, prod(local))) for rank in every}
    assert len(spans) == 1, "what is sent may not depend on the rank"
    if isinstance(how, Shard):
        row = prod(local) // local[how.dim]
        shared = row * sum(block.unit for block in how.blocks if replicas(block, degree) > 1)
        assert sum(stop - start for start, stop in spans.pop()) == shared


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), DEGREES, st.integers(1, 300))
def test_buckets_and_pieces_tile(lengths: list[int], ranks: int, bucket_bytes: int) -> None:
    length = padded(sum(lengths), ranks)
    assert 0 <= length - sum(lengths) < ranks
    seen, at = [], 0
    for start, stop in buckets(length, ranks, bucket_bytes):
        assert start == at
        assert (stop - start) % ranks == 0
        assert 4 * (stop - start) <= max(bucket_bytes, 4 * ranks)
        found = [*pieces(lengths, start, stop)]
        seen += [(piece.member, i) for piece in found for i in range(piece.start, piece.stop)]
        places = [i for piece in found for i in range(stop - start)[piece.part]]
        assert places == [*range(len(places))]
        at = stop
    assert at == length
    assert seen == [(member, i) for member, n in enumerate(lengths) for i in range(n)]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=5),
    st.sampled_from([(1, 1), (2, 2), (3, 3), (4, 2), (6, 3), (6, 2), (8, 8)]),
    st.integers(4, 200),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_owned_runs_tile_every_parameter(
    shapes: list[tuple[int, int]],
    ranks: tuple[int, int],
    bucket_bytes: int,
    zero: int,
    dtype: Any,
) -> None:
    """Over the data ranks, or a part of them, and each kind of state has the same runs."""
    spans: dict[tuple[str, str], list[tuple[int, int]]] = {}
    data, shard = ranks
    for rank in range(data):
        solo = Axes.solo()
        parameters = {
            f"p{i}": torch.nn.Parameter(torch.full(shape[: 1 + i % 2], i, dtype=dtype))
            for i, shape in enumerate(shapes)
        }
        optimizer = Zero(
            ShardedParameters({n: ShardedParameter(p, Replica()) for n, p in parameters.items()}),
            OptimConfig(),
            Axes(
                solo.tp,
                Seat("data", data, rank),
                solo.kv,
                Seat("world", data, rank),
                group=Seat("shard", shard, rank % shard) if shard < data else None,
                replica=Seat("replica", data // shard, rank // shard),
            ),
            sequence_parallel=False,
            zero=zero,
            bucket_bytes=bucket_bytes,
        )
        owners = shard if zero else 1
        assert optimizer.shard.size * optimizer.replica.size == data
        assert optimizer.shard.size == owners
        for owned in optimizer.owned():
            run = owned.start, owned.start + owned.tensor.numel()
            if rank < owners:
                spans.setdefault((owned.name, owned.kind), []).append(run)
            if owned.kind in ("weight", "master"):
                assert torch.all(owned.tensor == int(owned.name[1:]))
            if owned.kind == "weight":
                flat = parameters[owned.name].flatten()[run[0] : run[1]]
                assert flat.data_ptr() == owned.tensor.data_ptr() or flat.numel() == 0
    kinds = 3 if dtype == torch.float32 else 4
    assert len(spans) == kinds * len(shapes)
    for (name, _), runs in spans.items():
        at = 0
        for start, stop in sorted(runs):
            assert start == at
            at = stop
        assert at == prod(shapes[int(name[1:])][: 1 + int(name[1:]) % 2])
