"""Rules on how the model and the batch are divided over the ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from llamax.config.rules import Rules, World, divisors, multiples_near
from llamax.config.rules import pipeline as pipeline_rules
from llamax.config.schema import NEURON_BACKENDS, Config, DataConfig
from llamax.config.types import out_of_range
from llamax.runtime.errors import join_or
from llamax.runtime.units import count

RULES = Rules()


@RULES.reading("parallel.tensor", "model.num_attention_heads")
def tensor_divides_heads(c: Config, world: World) -> Iterator[str]:
    tensor, heads = c.parallel.tensor, c.model.num_attention_heads
    if heads % tensor:
        yield (
            f"parallel.tensor={tensor} does not divide model.num_attention_heads={heads}; "
            f"use {join_or(divisors(heads))}"
        )


@RULES.reading("parallel.tensor", "model.num_key_value_heads", "model.num_attention_heads")
def tensor_fits_kv_heads(c: Config, world: World) -> Iterator[str]:
    tensor, heads, kv = c.parallel.tensor, c.model.num_attention_heads, c.model.num_key_value_heads
    if heads % tensor == 0 and kv % tensor and tensor % kv:
        fitting = [d for d in divisors(heads) if kv % d == 0 or d % kv == 0]
        yield (
            f"parallel.tensor={tensor} is neither a divisor nor a multiple of "
            f"model.num_key_value_heads={kv}; use {join_or(fitting)}"
        )


@RULES.reading("parallel.tensor", "model.intermediate_size")
def tensor_divides_feed_forward(c: Config, world: World) -> Iterator[str]:
    tensor, width = c.parallel.tensor, c.model.intermediate_size
    if width % tensor:
        yield (
            f"parallel.tensor={tensor} does not divide model.intermediate_size={width}; "
            f"use {join_or([d for d in divisors(width) if d <= 2 * tensor])}"
        )


@RULES.reading("parallel.tensor", "parallel.sequence", "parallel.context", "data.sequence_length")
def tensor_divides_sequence(c: Config, world: World) -> Iterator[str]:
    tensor, length = c.parallel.tensor, c.data.sequence_length
    if c.parallel.sequence and c.parallel.context == 1 and length % tensor:
        yield (
            f"parallel.tensor={tensor} does not divide data.sequence_length={length}, which "
            f"parallel.sequence=true cuts; use {join_or(multiples_near(length, tensor))}, "
            f"or parallel.sequence=false"
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
            f"sequence{over}, but data.sequence_length={length} is not a multiple of {unit}; "
            f"use {join_or(multiples_near(length, unit))}"
        )


@RULES.reading("parallel.context", "parallel.context_by")
def ring_has_ranks(c: Config, world: World) -> Iterator[str]:
    if c.parallel.context_by == "ring" and c.parallel.context == 1:
        yield (
            "parallel.context_by=ring passes keys and values around context ranks, but "
            "parallel.context=1; use 2 or more, or parallel.context_by=gather"
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
            instead = _fitting(c, world, "pipeline", divisors(world.ranks // group))
        elif usable % tensor or context == 1:
            instead = _fitting(c, world, "tensor", divisors(usable), context=1, pipeline=1)
        else:
            instead = _fitting(c, world, "context", divisors(usable // tensor), pipeline=1)
        how = f" (llamax train --ranks {replica}, or torchrun)" if world.ranks == 1 else ""
        yield (
            f"{degrees} does not divide the world of {count(world.ranks, 'rank')}; "
            f"start a multiple of {count(replica, 'rank')}{how}{instead}"
        )
    elif data and replica * data != world.ranks:
        yield (
            f"{degrees} x parallel.data={data} is {count(replica * data, 'rank')}, but the "
            f"world has {world.ranks}; use parallel.data={world.ranks // replica}, or 0 for all "
            "ranks that are left"
        )


def _fitting(c: Config, world: World, name: str, degrees: list[int], **others: int) -> str:
    """The ``degrees`` of an axis, beside ``others``, with which no rule of the mesh complains."""
    broken = {key for key, _ in out_of_range(c)}
    every = (*RULES, *pipeline_rules.RULES)
    rules = [rule for keys, rule in every if broken.isdisjoint(keys)]

    def fits(degree: int) -> bool:
        changes: dict[str, Any] = {name: degree, **others}
        cut = replace(c, parallel=replace(c.parallel, **changes))
        return not any(line for rule in rules for line in rule(cut, world))

    found = [degree for degree in degrees if fits(degree)]
    changed = [other for other, degree in others.items() if getattr(c.parallel, other) != degree]
    more = "".join(f" and parallel.{other}={others[other]}" for other in changed)
    return f", or use parallel.{name}={join_or(found)}{more}" if found else ""


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
        f"use {within_node(c, node)}"
    )


OF_THE_MODEL = (
    tensor_divides_heads,
    tensor_fits_kv_heads,
    tensor_divides_feed_forward,
    tensor_divides_sequence,
    context_divides_sequence,
)


def within_node(c: Config, node_ranks: int) -> str:
    """Tensor or context degrees that keep a group of ranks in a node of ``node_ranks`` ranks."""
    tensor, context = c.parallel.tensor, c.parallel.context

    def usable(tensor: int, context: int) -> bool:
        cut = replace(c, parallel=replace(c.parallel, tensor=tensor, context=context))
        return not any(line for rule in OF_THE_MODEL for line in rule(cut, World()))

    if context > 1 and node_ranks % tensor == 0:
        fitting = [d for d in divisors(node_ranks // tensor) if usable(tensor, d)]
        return f"parallel.context={join_or(fitting or [1])}"
    fitting = [d for d in divisors(node_ranks) if usable(d, 1)]
    alone = " and parallel.context=1" if context > 1 else ""
    return f"parallel.tensor={join_or(fitting or [1])}{alone}"


def node_limit(backend: str, node_ranks: int) -> int | None:
    """The ranks of a node where tensor and context ranks must share one; None where they need not.

    NeuronLink ends at the node: groups that exchange activations in every layer stay inside on
    Trainium.  NCCL and gloo let a group span nodes, slowly.
    """
    return node_ranks if backend in NEURON_BACKENDS else None


def batch_divides(data: DataConfig, data_degree: int) -> Iterator[str]:
    """``data_degree`` ranks share the global batch in whole microsteps."""
    microstep = data.micro_batch * data_degree
    if data.global_batch % microstep:
        yield (
            f"data.global_batch={data.global_batch} is not a multiple of data.micro_batch="
            f"{data.micro_batch} x {count(data_degree, 'data rank')} = {microstep}; "
            f"use {join_or(multiples_near(data.global_batch, microstep))}"
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
    yield from batch_divides(c.data, c.parallel.data or left or 1)
