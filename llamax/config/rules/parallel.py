"""Rules on how the model and the batch are divided over the ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields

from llamax.config.rules import (
    Changes,
    Rules,
    World,
    changed,
    divisors,
    fitting,
    multiples_near,
    use,
    ways,
)
from llamax.config.schema import NEURON_BACKENDS, Config, DataConfig
from llamax.runtime.errors import join_or
from llamax.runtime.units import count

RULES = Rules()


@RULES.reading("parallel.tensor", "model.num_attention_heads")
def tensor_divides_heads(c: Config, world: World) -> Iterator[str]:
    tensor, heads = c.parallel.tensor, c.model.num_attention_heads
    if heads % tensor:
        yield (
            f"parallel.tensor={tensor} does not divide model.num_attention_heads={heads}"
            f"{ways(use(c, world, 'parallel.tensor', divisors(heads)))}"
        )


@RULES.reading("parallel.tensor", "model.num_key_value_heads", "model.num_attention_heads")
def tensor_fits_kv_heads(c: Config, world: World) -> Iterator[str]:
    tensor, heads, kv = c.parallel.tensor, c.model.num_attention_heads, c.model.num_key_value_heads
    if heads % tensor == 0 and kv % tensor and tensor % kv:
        instead = ways(use(c, world, "parallel.tensor", divisors(heads)))
        yield (
            f"parallel.tensor={tensor} is neither a divisor nor a multiple of "
            f"model.num_key_value_heads={kv}{instead}"
        )


@RULES.reading("parallel.tensor", "model.intermediate_size")
def tensor_divides_feed_forward(c: Config, world: World) -> Iterator[str]:
    tensor, width = c.parallel.tensor, c.model.intermediate_size
    if width % tensor:
        near = [d for d in divisors(width) if d <= 2 * tensor]
        yield (
            f"parallel.tensor={tensor} does not divide model.intermediate_size={width}"
            f"{ways(use(c, world, 'parallel.tensor', near))}"
        )


@RULES.reading("parallel.tensor", "parallel.sequence", "parallel.context", "data.sequence_length")
def tensor_divides_sequence(c: Config, world: World) -> Iterator[str]:
    tensor, length = c.parallel.tensor, c.data.sequence_length
    if c.parallel.sequence and c.parallel.context == 1 and length % tensor:
        instead = ways(lengths(c, world, tensor), "parallel.sequence=false")
        yield (
            f"parallel.tensor={tensor} does not divide data.sequence_length={length}, which "
            f"parallel.sequence=true cuts{instead}"
        )


@RULES.reading("parallel.tensor", "parallel.sequence", "parallel.context", "data.sequence_length")
def context_divides_sequence(c: Config, world: World) -> Iterator[str]:
    tensor, context, length = c.parallel.tensor, c.parallel.context, c.data.sequence_length
    cuts_further = c.parallel.sequence and tensor > 1
    unit = context * (math.lcm(2, tensor) if cuts_further else 2)
    if context > 1 and length % unit:
        over = f", cut over {tensor} tensor ranks (parallel.sequence=true)" if cuts_further else ""
        yield (
            f"parallel.context={context} gives each rank 2 of {2 * context} equal chunks of a "
            f"sequence{over}, but data.sequence_length={length} is not a multiple of {unit}"
            f"{ways(lengths(c, world, unit) or use(c, world, 'parallel.context', [1], True))}"
        )


def lengths(c: Config, world: World, unit: int) -> str:
    """The multiples of ``unit`` near the length of a sequence that may be suggested, or ''."""
    length = min(c.data.sequence_length, c.model.max_position_embeddings)
    return use(c, world, "data.sequence_length", multiples_near(length, unit), named=True)


@RULES.reading("parallel.context", "parallel.context_by")
def ring_has_ranks(c: Config, world: World) -> Iterator[str]:
    if c.parallel.context_by == "ring" and c.parallel.context == 1:
        more = divisors(world.ranks)[1:] if world.ranks else [2, 4, 8]
        yield (
            "parallel.context_by=ring passes keys and values around context ranks, but "
            "parallel.context=1"
            f"{ways('parallel.context_by=gather', use(c, world, 'parallel.context', more, True))}"
        )


@RULES.reading("parallel.tensor", "parallel.context", "parallel.pipeline", "parallel.data")
def mesh_fills_world(c: Config, world: World) -> Iterator[str]:
    tensor, context, pipeline = c.parallel.tensor, c.parallel.context, c.parallel.pipeline
    if world.ranks is None:
        return
    node, data = world.node_ranks or world.ranks, c.parallel.data
    group, replica = tensor * context, tensor * context * pipeline
    degrees = f"parallel.tensor={tensor}"
    others = [(f"parallel.{name}", getattr(c.parallel, name)) for name in ("context", "pipeline")]
    degrees += "".join(f" x {name}={degree}" for name, degree in others if degree > 1)
    if world.ranks % replica:
        usable = math.gcd(world.ranks, node)
        if pipeline > 1 and world.ranks % group == 0:
            instead = _degrees(c, world, "pipeline", divisors(world.ranks // group))
        elif usable % tensor or context == 1:
            instead = _degrees(c, world, "tensor", divisors(usable), context=1, pipeline=1)
        else:
            instead = _degrees(c, world, "context", divisors(usable // tensor), pipeline=1)
        how = f" (llamax train --ranks {replica}, or torchrun)" if world.ranks == 1 else ""
        instead = f", or use {instead}" if instead else ""
        yield (
            f"{degrees} does not divide the world of {count(world.ranks, 'rank')}; "
            f"start a multiple of {count(replica, 'rank')}{how}{instead}"
        )
    elif data and replica * data != world.ranks:
        yield (
            f"{degrees} x parallel.data={data} is {count(replica * data, 'rank')}, but the "
            f"world has {world.ranks}; use parallel.data={world.ranks // replica} or 0, for all "
            "ranks that are left"
        )


def _degrees(
    c: Config, world: World, name: str, degrees: list[int], follow: bool = False, **others: int
) -> str:
    """``parallel.NAME=1 or 2 and ...``: degrees of an axis, beside ``others``, to suggest, or ''.

    Where parallel.data or parallel.zero_ranks is set and does not go with them, it is set to 0 too;
    where no context ranks are left, keys and values are gathered.
    """
    key = f"parallel.{name}"
    beside: Changes = {f"parallel.{other}": others[other] for other in others}
    by, free = {"parallel.context_by": "gather"}, {"parallel.data": 0}
    sets: list[Changes] = [{}, free, by, {**free, **by}]
    if c.parallel.zero_ranks:
        sets += [{**more, "parallel.zero_ranks": 0} for more in sets]
    for more in sets:
        tried = [{key: degree, **beside, **more} for degree in degrees]
        found = fitting(c, world, (each for each in tried if _fills(c, world, each)), follow)
        if found:
            break
    else:
        return ""
    unlike = changed(c, {**beside, **more}).parallel
    also = [
        f" and parallel.{each.name}={getattr(unlike, each.name)}"
        for each in fields(unlike)
        if getattr(unlike, each.name) != getattr(c.parallel, each.name)
    ]
    return f"{key}={join_or([each[key] for each in found])}{''.join(also)}"


def _fills(c: Config, world: World, changes: Changes) -> bool:
    """Whether the changed degrees, with parallel.data if it is set, are all ranks of the world."""
    cut = changed(c, changes).parallel
    whole = cut.tensor * cut.context * cut.pipeline * cut.data
    return whole in (0, world.ranks or whole)


@RULES.reading(
    "parallel.tensor",
    "parallel.context",
    "model.num_attention_heads",
    "model.num_key_value_heads",
    "model.intermediate_size",
    "data.sequence_length",
)
def group_shares_node(c: Config, world: World) -> Iterator[str]:
    tensor, context, node = c.parallel.tensor, c.parallel.context, world.node_ranks
    if node is None or node % (tensor * context) == 0:
        return
    if context == 1:
        degrees, kinds = f"parallel.tensor={tensor}", "tensor"
    else:
        degrees = f"parallel.tensor={tensor} x parallel.context={context}"
        kinds = "tensor and context"
    yield (
        f"{degrees} does not divide a node of {count(node, 'rank')}, and {kinds} ranks share one; "
        f"use {within_node(c, world)}"
    )


def within_node(c: Config, world: World) -> str:
    """Tensor or context degrees that keep a group of ranks in a node."""
    tensor, context, node = c.parallel.tensor, c.parallel.context, world.node_ranks or 1
    gather = " and parallel.context_by=gather" if c.parallel.context_by == "ring" else ""
    if context > 1 and node % tensor == 0:
        inside = _degrees(c, world, "context", divisors(node // tensor), follow=True)
        return inside or f"parallel.context=1{gather}"
    alone = {"context": 1} if context > 1 else {}
    inside = _degrees(c, world, "tensor", divisors(node), follow=True, **alone)
    return inside or "parallel.tensor=1" + f" and parallel.context=1{gather}" * bool(alone)


def node_limit(backend: str, node_ranks: int) -> int | None:
    """The ranks of a node where tensor and context ranks must share one; None where they need not.

    NeuronLink ends at the node: groups that exchange activations in every layer stay inside on
    Trainium.  NCCL and gloo let a group span nodes, slowly.
    """
    return node_ranks if backend in NEURON_BACKENDS else None


def batch_divides(data: DataConfig, data_degree: int, groups: int = 1) -> Iterator[str]:
    """``data_degree`` ranks share the global batch in whole microsteps.

    What is suggested is a multiple of ``groups`` of them.
    """
    microstep = data.micro_batch * data_degree
    if data.global_batch % microstep:
        yield (
            f"data.global_batch={data.global_batch} is not a multiple of data.micro_batch="
            f"{data.micro_batch} x {count(data_degree, 'data rank')} = {microstep}; "
            f"use {join_or(multiples_near(data.global_batch, microstep * groups))}"
        )


@RULES.reading(
    "data.global_batch",
    "data.micro_batch",
    "parallel.tensor",
    "parallel.context",
    "parallel.pipeline",
    "parallel.data",
)
def batch_divides_over_mesh(c: Config, world: World) -> Iterator[str]:
    # 0 if the other degrees exceed the world: see mesh_fills_world
    left = (world.ranks or 1) // (c.parallel.tensor * c.parallel.context * c.parallel.pipeline)
    groups = c.parallel.pipeline if c.parallel.chunks > 1 else 1
    yield from batch_divides(c.data, c.parallel.data or left or 1, groups)
