"""What must hold in a configuration: every rule is a function that yields a line per problem.

First each field by itself (its range, its choices), then the rules between fields.  A rule names
the fields it reads and is skipped where one of those is unusable or out of range already, so each
mistake is told once and nothing divides by zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Literal, get_args, get_origin, get_type_hints

from llamax.config.model import RopeScaling
from llamax.config.schema import Config, DataConfig, sections

Rule = Callable[[Config, "int | None"], Iterator[str]]
RULES: list[tuple[tuple[str, ...], Rule]] = []
HINTS = {kind: get_type_hints(kind) for kind in (RopeScaling, *get_type_hints(Config).values())}


def rule(*keys: str) -> Callable[[Rule], Rule]:
    """Register a rule that reads the fields ``keys``."""

    def register(function: Rule) -> Rule:
        RULES.append((keys, function))
        return function

    return register


def problems(
    config: Config, world_size: int | None = None, unusable: Iterable[str] = ()
) -> Iterator[str]:
    """All problems, one line each: those of single fields first; see ``Config.problems``."""
    unusable = set(unusable)
    if unusable & {"model.hidden_size", "model.num_attention_heads"}:
        unusable.add("model.head_dim")  # follows from them

    def usable(key: str) -> bool:
        section, _, _ = key.rpartition(".")
        return key not in unusable and (not section or usable(section))

    broken = {key: line for key, line in _out_of_range(config) if usable(key)}
    yield from broken.values()
    for keys, check in RULES:
        if broken.keys().isdisjoint(keys) and all(map(usable, keys)):
            yield from check(config, world_size)


def _out_of_range(config: Config) -> Iterator[tuple[str, str]]:
    for prefix, section in sections(config):
        hints = HINTS[type(section)]
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


def either(choices: Sequence[object]) -> str:
    """``a, b or c``."""
    *most, last = map(str, choices)
    return f"{', '.join(most)} or {last}" if most else last


def divisors(n: int) -> list[int]:
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return low + [n // d for d in reversed(low) if d * d < n]


def multiples_near(n: int, step: int) -> list[int]:
    """The multiples of ``step`` on both sides of ``n``, without 0."""
    below = n - n % step
    return [m for m in (below, below + step) if m]


# ---- the model


@rule("model.hidden_size", "model.num_attention_heads", "model.head_dim")
def heads_divide_hidden(c: Config, world: int | None) -> Iterator[str]:
    whole, rest = divmod(c.model.hidden_size, c.model.num_attention_heads)
    if rest and c.model.head_dim == whole:
        yield (
            f"model.num_attention_heads={c.model.num_attention_heads} does not divide "
            f"model.hidden_size={c.model.hidden_size}; use a divisor, or set model.head_dim"
        )


@rule("model.head_dim")
def heads_turn_pairs(c: Config, world: int | None) -> Iterator[str]:
    if c.model.head_dim % 2:
        yield (
            f"model.head_dim={c.model.head_dim} is odd, and rotary positions turn pairs of "
            f"features; use {c.model.head_dim + 1}"
        )


@rule("model.num_attention_heads", "model.num_key_value_heads")
def queries_share_keys(c: Config, world: int | None) -> Iterator[str]:
    heads, kv = c.model.num_attention_heads, c.model.num_key_value_heads
    if heads % kv:
        yield (
            f"model.num_key_value_heads={kv} does not divide model.num_attention_heads={heads}; "
            f"use {either(divisors(heads))}"
        )


@rule("model.bos_token_id", "model.eos_token_id", "model.vocab_size")
def special_tokens_exist(c: Config, world: int | None) -> Iterator[str]:
    bos = c.model.bos_token_id
    named = [("bos_token_id", bos)] if bos is not None else []
    for name, token in named + [("eos_token_id", eos) for eos in c.model.eos_token_ids]:
        if token >= c.model.vocab_size:
            yield (
                f"model.{name}={token} is outside model.vocab_size={c.model.vocab_size}; "
                f"use 0 to {c.model.vocab_size - 1}"
            )


@rule("model.rope_scaling.low_freq_factor", "model.rope_scaling.high_freq_factor")
def rope_bands_in_order(c: Config, world: int | None) -> Iterator[str]:
    rope = c.model.rope_scaling
    if rope and rope.low_freq_factor >= rope.high_freq_factor:
        yield (
            f"model.rope_scaling.low_freq_factor={rope.low_freq_factor} is not below "
            f"model.rope_scaling.high_freq_factor={rope.high_freq_factor}; Llama 3 has 1.0 and 4.0"
        )


@rule("model.rope_scaling.factor")
def rope_stretches(c: Config, world: int | None) -> Iterator[str]:
    rope = c.model.rope_scaling
    if rope and rope.factor < 1:
        yield (
            f"model.rope_scaling.factor={rope.factor} would shrink the context; "
            f"use 1.0 or more (Llama 3.1 has 8.0, Llama 3.2 has 32.0)"
        )


# ---- the mesh


@rule("parallel.tensor", "model.num_attention_heads")
def tensor_divides_heads(c: Config, world: int | None) -> Iterator[str]:
    tensor, heads = c.parallel.tensor, c.model.num_attention_heads
    if heads % tensor:
        yield (
            f"parallel.tensor={tensor} does not divide model.num_attention_heads={heads}; "
            f"use {either(divisors(heads))}"
        )


@rule("parallel.tensor", "model.num_key_value_heads", "model.num_attention_heads")
def tensor_fits_kv_heads(c: Config, world: int | None) -> Iterator[str]:
    tensor, heads, kv = c.parallel.tensor, c.model.num_attention_heads, c.model.num_key_value_heads
    if heads % tensor == 0 and kv % tensor and tensor % kv:
        fitting = [d for d in divisors(heads) if kv % d == 0 or d % kv == 0]
        yield (
            f"parallel.tensor={tensor} is neither a divisor nor a multiple of "
            f"model.num_key_value_heads={kv}; use {either(fitting)}"
        )


@rule("parallel.tensor", "model.intermediate_size")
def tensor_divides_feed_forward(c: Config, world: int | None) -> Iterator[str]:
    tensor, width = c.parallel.tensor, c.model.intermediate_size
    if width % tensor:
        yield (
            f"parallel.tensor={tensor} does not divide model.intermediate_size={width}; "
            f"use {either([d for d in divisors(width) if d <= 2 * tensor])}"
        )


@rule("parallel.tensor", "parallel.sequence", "data.sequence_length")
def tensor_divides_sequence(c: Config, world: int | None) -> Iterator[str]:
    tensor, length = c.parallel.tensor, c.data.sequence_length
    if c.parallel.sequence and length % tensor:
        yield (
            f"parallel.tensor={tensor} does not divide data.sequence_length={length}, which "
            f"parallel.sequence=true cuts; use {either(multiples_near(length, tensor))}, "
            f"or parallel.sequence=false"
        )


@rule("parallel.tensor", "parallel.data")
def mesh_fills_world(c: Config, world: int | None) -> Iterator[str]:
    tensor, data = c.parallel.tensor, c.parallel.data
    if world is None:
        return
    if world % tensor:
        yield (
            f"parallel.tensor={tensor} does not divide the world of {world} ranks; "
            f"start a multiple of {tensor} ranks, or use {either(divisors(world))}"
        )
    elif data and tensor * data != world:
        yield (
            f"parallel.tensor={tensor} x parallel.data={data} is {tensor * data} ranks, but the "
            f"world has {world}; use parallel.data={world // tensor}, or 0 to take what is there"
        )


# ---- batches and steps


def batch_divides(data: DataConfig, data_degree: int) -> Iterator[str]:
    """``data_degree`` ranks share the global batch in whole microsteps."""
    microstep = data.micro_batch * data_degree
    if data.global_batch % microstep:
        yield (
            f"data.global_batch={data.global_batch} is not a multiple of data.micro_batch="
            f"{data.micro_batch} x {data_degree} data ranks = {microstep}; "
            f"use {either(multiples_near(data.global_batch, microstep))}"
        )


@rule("data.global_batch", "data.micro_batch", "parallel.tensor", "parallel.data")
def batch_divides_over_mesh(c: Config, world: int | None) -> Iterator[str]:
    left = (world or 1) // c.parallel.tensor  # 0 where tensor exceeds the world: told elsewhere
    yield from batch_divides(c.data, c.parallel.data or left or 1)


@rule("data.sequence_length", "model.max_position_embeddings")
def sequence_fits_model(c: Config, world: int | None) -> Iterator[str]:
    length, longest = c.data.sequence_length, c.model.max_position_embeddings
    if length > longest:
        yield (
            f"data.sequence_length={length} is above model.max_position_embeddings={longest}; "
            f"use {longest} or less, or raise the model's"
        )


@rule("optim.lr", "optim.min_lr", "optim.schedule")
def learning_rate_falls(c: Config, world: int | None) -> Iterator[str]:
    if c.optim.schedule != "constant" and c.optim.min_lr > c.optim.lr:
        yield (
            f"optim.min_lr={c.optim.min_lr} is above optim.lr={c.optim.lr}; "
            f"use {c.optim.lr} or less"
        )


@rule("optim.warmup_steps", "optim.warmup_ratio")
def warmup_is_said_once(c: Config, world: int | None) -> Iterator[str]:
    if c.optim.warmup_steps and c.optim.warmup_ratio:
        yield (
            f"optim.warmup_steps={c.optim.warmup_steps} and optim.warmup_ratio="
            f"{c.optim.warmup_ratio} both say how long warm-up is; use one of them"
        )


@rule("run.stochastic_rounding", "run.backend", "run.dtype")
def neuron_cores_round(c: Config, world: int | None) -> Iterator[str]:
    if c.run.stochastic_rounding and (c.run.backend, c.run.dtype) != ("xla", "bfloat16"):
        yield (
            f"run.stochastic_rounding is what NeuronCores do to bfloat16, but run.backend="
            f"{c.run.backend} and run.dtype={c.run.dtype}; use xla and bfloat16, or leave it off"
        )


@rule("run.patience", "run.validate_every", "run.validate_each_epoch")
def patience_needs_validation(c: Config, world: int | None) -> Iterator[str]:
    if c.run.patience and not c.run.validates:
        yield (
            f"run.patience={c.run.patience} but nothing is validated; set run.validate_every or "
            "run.validate_each_epoch=true"
        )


@rule("checkpoint.keep_best", "run.validate_every", "run.validate_each_epoch")
def best_needs_validation(c: Config, world: int | None) -> Iterator[str]:
    if c.checkpoint.keep_best and not c.run.validates:
        yield (
            "checkpoint.keep_best=true but nothing is validated; set run.validate_every or "
            "run.validate_each_epoch=true"
        )


@rule("optim.decay_steps", "optim.schedule", "run.steps")
def decay_belongs_to_wsd(c: Config, world: int | None) -> Iterator[str]:
    schedule, decay = c.optim.schedule, c.optim.decay_steps
    if schedule == "wsd" and not decay:
        yield (
            f"optim.decay_steps=0 with optim.schedule=wsd; "
            f"use 1 to {c.run.steps}, the last fifth of the run for example"
        )
    if schedule != "wsd" and decay:
        yield (
            f"optim.decay_steps={decay} means nothing to optim.schedule={schedule}; "
            f"use 0, or optim.schedule=wsd"
        )


@rule("optim.warmup_steps", "optim.decay_steps", "run.steps", "run.epochs")
def schedule_fits_run(c: Config, world: int | None) -> Iterator[str]:
    warmup, decay, steps = c.optim.warmup_steps, c.optim.decay_steps, c.run.steps
    if warmup + decay > steps and not c.run.epochs:  # then asked again, when steps are known
        yield (
            f"optim.warmup_steps={warmup} + optim.decay_steps={decay} is above run.steps={steps}; "
            f"use at most {steps} together"
        )


# ---- folders


@rule()
def folders_are_named(c: Config, world: int | None) -> Iterator[str]:
    for key, value, use in (
        ("data.path", c.data.path, "the folder that llamax prepare wrote"),
        ("run.folder", c.run.folder, "a folder for this run"),
        ("checkpoint.resume", c.checkpoint.resume, "auto, never or a checkpoint folder"),
    ):
        if not value.strip():
            yield f"{key} is empty; use {use}"


# ---- fine-tuning

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def target_names(targets: str) -> tuple[str, ...]:
    """The projections that ``finetune.targets`` names, as written."""
    if targets.strip() == "all-linear":
        return LINEAR
    return tuple(name.strip() for name in targets.split(","))


@rule("finetune.method", "finetune.targets")
def targets_match_modules(c: Config, world: int | None) -> Iterator[str]:
    unknown = [name for name in target_names(c.finetune.targets) if name not in LINEAR]
    if c.finetune.method != "full" and unknown:
        yield (
            f"finetune.targets={c.finetune.targets!r}: {unknown[0]!r} matches no module; "
            f"use all-linear or some of {', '.join(LINEAR)}"
        )


@rule("finetune.method", "checkpoint.init_from")
def adapters_have_a_base(c: Config, world: int | None) -> Iterator[str]:
    if c.finetune.method != "full" and not c.checkpoint.init_from:
        yield (
            f"finetune.method={c.finetune.method} trains adapters of a model, and "
            f"checkpoint.init_from is empty; use the folder of the base"
        )


NF4_BLOCK = 64  # weights that share a scale


@rule(
    "finetune.method",
    "finetune.quant",
    "parallel.tensor",
    "model.hidden_size",
    "model.intermediate_size",
    "model.num_attention_heads",
    "model.head_dim",
)
def blocks_fit_shares(c: Config, world: int | None) -> Iterator[str]:
    if (c.finetune.method, c.finetune.quant) != ("qlora", "nf4"):
        return
    model, tensor = c.model, c.parallel.tensor
    inputs = {
        "model.hidden_size": (model.hidden_size, 1),
        "model.intermediate_size": (model.intermediate_size, tensor),
        "model.num_attention_heads x head_dim": (
            model.num_attention_heads * model.head_dim,
            tensor,
        ),
    }
    for key, (width, cut) in inputs.items():
        if width % NF4_BLOCK:
            yield (
                f"{key}={width} is not a multiple of {NF4_BLOCK}, the block of finetune.quant=nf4; "
                f"use finetune.quant=int8 or finetune.method=lora"
            )
        elif width % (2 * cut):
            yield (
                f"parallel.tensor={tensor} leaves an odd share of {key}={width}, and "
                f"finetune.quant=nf4 packs weights in pairs; use finetune.quant=int8"
            )


@rule("checkpoint.also_hf", "finetune.method")
def adapters_are_no_model(c: Config, world: int | None) -> Iterator[str]:
    if c.checkpoint.also_hf and c.finetune.method != "full":
        yield (
            f"checkpoint.also_hf=true with finetune.method={c.finetune.method}: a checkpoint of "
            "adapters is no whole model; use checkpoint.also_hf=false, and llamax merge afterwards"
        )
