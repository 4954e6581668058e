"""What must hold in a configuration: every rule is a function that returns a line or None.

First each field by itself (its range, its choices), then the rules between fields.  A rule names
the fields it reads and is skipped where one of those is already out of range, so each mistake is
told once and nothing divides by zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Literal, get_args, get_origin, get_type_hints

from llamax.config import Config, Data, sections

Rule = Callable[[Config, "int | None"], "str | None"]
RULES: list[tuple[tuple[str, ...], Rule]] = []


def rule(*keys: str) -> Callable[[Rule], Rule]:
    """Register a rule that reads the fields ``keys``."""

    def register(function: Rule) -> Rule:
        RULES.append((keys, function))
        return function

    return register


def problems(config: Config, world_size: int | None) -> Iterator[str]:
    """All problems, one line each: those of single fields first."""
    broken = dict(_out_of_range(config))
    yield from broken.values()
    for keys, check in RULES:
        if broken.keys().isdisjoint(keys) and (problem := check(config, world_size)):
            yield problem


def _out_of_range(config: Config) -> Iterator[tuple[str, str]]:
    for prefix, section in sections(config):
        hints = get_type_hints(type(section))
        for each in fields(section):
            key, value = f"{prefix}.{each.name}", getattr(section, each.name)
            allowed = each.metadata["range"]
            if get_origin(hints[each.name]) is Literal:
                choices = get_args(hints[each.name])
                if value not in choices:
                    yield key, f"{key}={value!r} is unknown; use {either(choices)}"
            elif allowed and value is not None:
                numbers = value if isinstance(value, tuple) else (value,)
                if not all(allowed.holds(number) for number in numbers):
                    yield key, f"{key}={value} is out of range; use {allowed.words}"


def either(choices: tuple[object, ...] | list[int]) -> str:
    """``a, b or c``."""
    *most, last = map(str, choices)
    return f"{', '.join(most)} or {last}" if most else last


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


# ---- the model


@rule("model.hidden_size", "model.num_attention_heads", "model.head_dim")
def _heads_divide_hidden(c: Config, world: int | None) -> str | None:
    m = c.model
    whole, rest = divmod(m.hidden_size, m.num_attention_heads)
    if not rest or m.head_dim != whole:
        return None
    return (
        f"model.num_attention_heads={m.num_attention_heads} does not divide "
        f"model.hidden_size={m.hidden_size}; use a divisor, or set model.head_dim"
    )


@rule("model.head_dim")
def _head_dim_even(c: Config, world: int | None) -> str | None:
    if c.model.head_dim % 2 == 0:
        return None
    return (
        f"model.head_dim={c.model.head_dim} is odd, and rotary positions turn pairs of features; "
        f"use {c.model.head_dim + 1}"
    )


@rule("model.num_attention_heads", "model.num_key_value_heads")
def _groups_of_heads(c: Config, world: int | None) -> str | None:
    heads, kv = c.model.num_attention_heads, c.model.num_key_value_heads
    if heads % kv == 0:
        return None
    return (
        f"model.num_key_value_heads={kv} does not divide model.num_attention_heads={heads}; "
        f"use {either(divisors(heads))}"
    )


@rule("model.bos_token_id", "model.eos_token_id", "model.vocab_size")
def _special_tokens(c: Config, world: int | None) -> str | None:
    m = c.model
    for name, ids in (
        ("bos_token_id", () if m.bos_token_id is None else (m.bos_token_id,)),
        ("eos_token_id", m.eos_token_ids),
    ):
        for token in ids:
            if token >= m.vocab_size:
                return (
                    f"model.{name}={token} is outside model.vocab_size={m.vocab_size}; "
                    f"use 0 to {m.vocab_size - 1}"
                )
    return None


@rule("model.rope_scaling.low_freq_factor", "model.rope_scaling.high_freq_factor")
def _rope_order(c: Config, world: int | None) -> str | None:
    scaling = c.model.rope_scaling
    if scaling is None or scaling.low_freq_factor < scaling.high_freq_factor:
        return None
    return (
        f"model.rope_scaling.low_freq_factor={scaling.low_freq_factor} is not below "
        f"high_freq_factor={scaling.high_freq_factor}; Llama 3.1 uses 1.0 and 4.0"
    )


@rule("model.rope_scaling.factor")
def _rope_factor(c: Config, world: int | None) -> str | None:
    scaling = c.model.rope_scaling
    if scaling is None or scaling.factor >= 1:
        return None
    return (
        f"model.rope_scaling.factor={scaling.factor} would shrink the context; "
        f"use 1.0 or more (Llama 3.1: 8.0, Llama 3.2: 32.0)"
    )


# ---- the mesh


@rule("parallel.tensor", "model.num_attention_heads")
def _tensor_divides_heads(c: Config, world: int | None) -> str | None:
    tensor, heads = c.parallel.tensor, c.model.num_attention_heads
    if heads % tensor == 0:
        return None
    return (
        f"parallel.tensor={tensor} does not divide model.num_attention_heads={heads}; "
        f"use {either(divisors(heads))}"
    )


@rule("parallel.tensor", "model.num_key_value_heads", "model.num_attention_heads")
def _tensor_fits_kv_heads(c: Config, world: int | None) -> str | None:
    tensor, heads, kv = c.parallel.tensor, c.model.num_attention_heads, c.model.num_key_value_heads
    if heads % tensor or kv % tensor == 0 or tensor % kv == 0:
        return None
    fitting = [d for d in divisors(heads) if kv % d == 0 or d % kv == 0]
    return (
        f"parallel.tensor={tensor} is neither a divisor nor a multiple of "
        f"model.num_key_value_heads={kv}; use {either(fitting)}"
    )


@rule("parallel.tensor", "model.intermediate_size")
def _tensor_divides_feed_forward(c: Config, world: int | None) -> str | None:
    tensor, width = c.parallel.tensor, c.model.intermediate_size
    if width % tensor == 0:
        return None
    return (
        f"parallel.tensor={tensor} does not divide model.intermediate_size={width}; "
        f"use {either([d for d in divisors(width) if d <= 64])}"
    )


@rule("parallel.tensor", "data.sequence_length")
def _tensor_divides_sequence(c: Config, world: int | None) -> str | None:
    tensor, length = c.parallel.tensor, c.data.sequence_length
    if not c.parallel.sequence or length % tensor == 0:
        return None
    return (
        f"parallel.tensor={tensor} does not divide data.sequence_length={length}, which "
        f"parallel.sequence=true cuts; use {length + -length % tensor}, or parallel.sequence=false"
    )


@rule("parallel.tensor", "parallel.data")
def _mesh_fills_world(c: Config, world: int | None) -> str | None:
    tensor, data = c.parallel.tensor, c.parallel.data
    if world is None:
        return None
    if world % tensor:
        return (
            f"parallel.tensor={tensor} does not divide the world of {world} ranks; "
            f"start a multiple of {tensor} ranks, or use {either(divisors(world))}"
        )
    if data and tensor * data != world:
        return (
            f"parallel.tensor={tensor} x parallel.data={data} is {tensor * data} ranks, but the "
            f"world has {world}; use parallel.data={world // tensor}, or 0 to take what is there"
        )
    return None


# ---- batches and steps


def accumulation(data: Data, data_degree: int) -> str | None:
    """Why ``data_degree`` ranks cannot share the global batch in whole microsteps, or None."""
    microstep = data.micro_batch * data_degree
    if data.global_batch % microstep == 0:
        return None
    below = data.global_batch - data.global_batch % microstep
    return (
        f"data.global_batch={data.global_batch} is not a multiple of data.micro_batch="
        f"{data.micro_batch} x {data_degree} data ranks = {microstep}; "
        f"use {either(([below] if below else []) + [below + microstep])}"
    )


@rule("data.global_batch", "data.micro_batch", "parallel.tensor", "parallel.data")
def _batch_divides(c: Config, world: int | None) -> str | None:
    if world is not None and world % c.parallel.tensor == 0:
        return accumulation(c.data, c.parallel.data or world // c.parallel.tensor)
    return accumulation(c.data, c.parallel.data or 1)


@rule("data.sequence_length", "model.max_position_embeddings")
def _sequence_fits_model(c: Config, world: int | None) -> str | None:
    length, longest = c.data.sequence_length, c.model.max_position_embeddings
    if length <= longest:
        return None
    return (
        f"data.sequence_length={length} is above model.max_position_embeddings={longest}; "
        f"use {longest} or less, or raise the model's"
    )


@rule("optim.lr", "optim.min_lr", "optim.schedule")
def _lr_falls(c: Config, world: int | None) -> str | None:
    o = c.optim
    if o.schedule == "constant" or o.min_lr <= o.lr:
        return None
    return f"optim.min_lr={o.min_lr} is above optim.lr={o.lr}; use {o.lr} or less"


@rule("optim.warmup_steps", "optim.decay_steps", "optim.schedule", "run.steps")
def _schedule_fits_run(c: Config, world: int | None) -> str | None:
    o, steps = c.optim, c.run.steps
    if o.schedule == "wsd" and not o.decay_steps:
        return f"optim.schedule=wsd needs optim.decay_steps; use {max(1, steps // 5)}, for example"
    if o.schedule != "wsd" and o.decay_steps:
        return (
            f"optim.decay_steps={o.decay_steps} means nothing to optim.schedule={o.schedule}; "
            f"remove it, or use optim.schedule=wsd"
        )
    if o.warmup_steps + o.decay_steps > steps:
        return (
            f"optim.warmup_steps={o.warmup_steps} + optim.decay_steps={o.decay_steps} is above "
            f"run.steps={steps}; use at most {steps} together"
        )
    return None


# ---- folders


@rule("data.path", "run.folder", "checkpoint.resume")
def _folders_named(c: Config, world: int | None) -> str | None:
    for key, value, use in (
        ("data.path", c.data.path, "the folder that llamax prepare wrote"),
        ("run.folder", c.run.folder, "a folder for this run"),
        ("checkpoint.resume", c.checkpoint.resume, "auto, never or a checkpoint folder"),
    ):
        if not value.strip():
            return f"{key} is empty; use {use}"
    return None
