"""Rules on how the model and the batch are divided over the ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

from llamax.config.rules import Rules, divisors, multiples_near
from llamax.config.schema import Config, DataConfig
from llamax.runtime.errors import join_or

RULES = Rules()


@RULES.reading("parallel.tensor", "model.num_attention_heads")
def tensor_divides_heads(c: Config, world: int | None) -> Iterator[str]:
    tensor, heads = c.parallel.tensor, c.model.num_attention_heads
    if heads % tensor:
        yield (
            f"parallel.tensor={tensor} does not divide model.num_attention_heads={heads}; "
            f"use {join_or(divisors(heads))}"
        )


@RULES.reading("parallel.tensor", "model.num_key_value_heads", "model.num_attention_heads")
def tensor_fits_kv_heads(c: Config, world: int | None) -> Iterator[str]:
    tensor, heads, kv = c.parallel.tensor, c.model.num_attention_heads, c.model.num_key_value_heads
    if heads % tensor == 0 and kv % tensor and tensor % kv:
        fitting = [d for d in divisors(heads) if kv % d == 0 or d % kv == 0]
        yield (
            f"parallel.tensor={tensor} is neither a divisor nor a multiple of "
            f"model.num_key_value_heads={kv}; use {join_or(fitting)}"
        )


@RULES.reading("parallel.tensor", "model.intermediate_size")
def tensor_divides_feed_forward(c: Config, world: int | None) -> Iterator[str]:
    tensor, width = c.parallel.tensor, c.model.intermediate_size
    if width % tensor:
        yield (
            f"parallel.tensor={tensor} does not divide model.intermediate_size={width}; "
            f"use {join_or([d for d in divisors(width) if d <= 2 * tensor])}"
        )


@RULES.reading("parallel.tensor", "parallel.sequence", "parallel.context", "data.sequence_length")
def tensor_divides_sequence(c: Config, world: int | None) -> Iterator[str]:
    tensor, length = c.parallel.tensor, c.data.sequence_length
    if c.parallel.sequence and c.parallel.context == 1 and length % tensor:
        yield (
            f"parallel.tensor={tensor} does not divide data.sequence_length={length}, which "
            f"parallel.sequence=true cuts; use {join_or(multiples_near(length, tensor))}, "
            f"or parallel.sequence=false"
        )


@RULES.reading("parallel.tensor", "parallel.sequence", "parallel.context", "data.sequence_length")
def context_divides_sequence(c: Config, world: int | None) -> Iterator[str]:
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


@RULES.reading("parallel.tensor", "parallel.context", "parallel.data")
def mesh_fills_world(c: Config, world: int | None) -> Iterator[str]:
    tensor, context, data = c.parallel.tensor, c.parallel.context, c.parallel.data
    if world is None:
        return
    replica = tensor * context
    degrees = f"parallel.tensor={tensor}"
    if context > 1:
        degrees += f" x parallel.context={context}"
    if world % replica:
        if context == 1:
            instead = f"use {join_or(divisors(world))}"
        elif world % tensor:
            instead = f"use parallel.tensor={join_or(divisors(world))} and parallel.context=1"
        else:
            instead = f"use parallel.context={join_or(divisors(world // tensor))}"
        yield (
            f"{degrees} does not divide the world of {world} ranks; "
            f"start a multiple of {replica} ranks, or {instead}"
        )
    elif data and replica * data != world:
        yield (
            f"{degrees} x parallel.data={data} is {replica * data} ranks, but the "
            f"world has {world}; use parallel.data={world // replica}, or 0 for all ranks that are "
            "left"
        )


def batch_divides(data: DataConfig, data_degree: int) -> Iterator[str]:
    """``data_degree`` ranks share the global batch in whole microsteps."""
    microstep = data.micro_batch * data_degree
    if data.global_batch % microstep:
        yield (
            f"data.global_batch={data.global_batch} is not a multiple of data.micro_batch="
            f"{data.micro_batch} x {data_degree} data ranks = {microstep}; "
            f"use {join_or(multiples_near(data.global_batch, microstep))}"
        )


@RULES.reading(
    "data.global_batch",
    "data.micro_batch",
    "parallel.tensor",
    "parallel.context",
    "parallel.data",
)
def batch_divides_over_mesh(c: Config, world: int | None) -> Iterator[str]:
    # 0 if tensor x context exceeds the world: see mesh_fills_world
    left = (world or 1) // (c.parallel.tensor * c.parallel.context)
    yield from batch_divides(c.data, c.parallel.data or left or 1)
