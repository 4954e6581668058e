"""Rules on samples, the schedule, validation, precision and folders."""

from __future__ import annotations

import math
from collections.abc import Iterator

from llamax.config.rules import Changes, Rules, World, fitting, fitting_values, ways
from llamax.config.schema import NEURON_BACKENDS, Config
from llamax.runtime.address import protocol

RULES = Rules()


@RULES.reading("data.sequence_length", "model.max_position_embeddings")
def sequence_fits_model(c: Config, world: World) -> Iterator[str]:
    length, longest = c.data.sequence_length, c.model.max_position_embeddings
    if length > longest:
        unit = math.lcm(max(c.parallel.tensor, 1), 2 * max(c.parallel.context, 1))
        tried = dict.fromkeys((longest, longest - longest % unit or longest))
        found = fitting_values(c, world, "data.sequence_length", tried)
        yield (
            f"data.sequence_length={length} is above model.max_position_embeddings={longest}"
            f"{ways(*map(str, found[:1]))}{', or' if found else ';'} raise the model's"
        )


@RULES.reading("optim.lr", "optim.min_lr", "optim.schedule")
def learning_rate_falls(c: Config, world: World) -> Iterator[str]:
    if c.optim.schedule != "constant" and c.optim.min_lr > c.optim.lr:
        yield (
            f"optim.min_lr={c.optim.min_lr} is above optim.lr={c.optim.lr}; "
            f"use {c.optim.lr} or less"
        )


@RULES.reading("optim.warmup_steps", "optim.warmup_ratio")
def warmup_is_given_once(c: Config, world: World) -> Iterator[str]:
    if c.optim.warmup_steps and c.optim.warmup_ratio:
        yield (
            f"optim.warmup_steps={c.optim.warmup_steps} and optim.warmup_ratio="
            f"{c.optim.warmup_ratio} both set the length of warm-up; use one of them"
        )


@RULES.reading("optim.rewind", "optim.skip_spikes")
def rewind_needs_skipping(c: Config, world: World) -> Iterator[str]:
    if c.optim.rewind and c.optim.skip_spikes == "off":
        yield (
            f"optim.rewind={c.optim.rewind} counts skipped steps, but optim.skip_spikes=off; set "
            "optim.skip_spikes=both, loss or norm"
        )


@RULES.reading(
    "optim.rewind", "checkpoint.every", "checkpoint.every_minutes", "checkpoint.each_epoch"
)
def rewind_needs_checkpoints(c: Config, world: World) -> Iterator[str]:
    saved = c.checkpoint
    if c.optim.rewind and not (saved.every or saved.every_minutes or saved.each_epoch):
        yield (
            f"optim.rewind={c.optim.rewind} goes back to a checkpoint, but none is saved before "
            "the end; set checkpoint.every, checkpoint.every_minutes or checkpoint.each_epoch=true"
        )


@RULES.reading("optim.rewind", "optim.most_skipped")
def rewind_comes_before_the_end(c: Config, world: World) -> Iterator[str]:
    if c.optim.rewind > c.optim.most_skipped:
        yield (
            f"optim.rewind={c.optim.rewind} is above optim.most_skipped={c.optim.most_skipped}, "
            f"after which the run ends; use {c.optim.most_skipped} or less, or raise "
            "optim.most_skipped"
        )


@RULES.reading("run.stochastic_rounding", "run.backend", "run.dtype")
def neuron_cores_round(c: Config, world: World) -> Iterator[str]:
    if c.run.stochastic_rounding and (c.run.backend, c.run.dtype) != ("xla", "bfloat16"):
        there: Changes = {"run.backend": "xla", "run.dtype": "bfloat16"}
        on_xla = ", or use run.backend=xla and run.dtype=bfloat16"
        on_xla = on_xla if fitting(c, world, [there]) else ""
        yield (
            f"run.stochastic_rounding is for bfloat16 on NeuronCores, but run.backend="
            f"{c.run.backend} and run.dtype={c.run.dtype}; leave it off{on_xla}"
        )


@RULES.reading("run.dtype", "run.backend")
def float16_is_for_others(c: Config, world: World) -> Iterator[str]:
    if c.run.dtype == "float16" and c.run.backend in NEURON_BACKENDS:
        yield (
            f"run.dtype=float16 with run.backend={c.run.backend}: NeuronCores multiply bfloat16 as "
            "fast and flush the small numbers that float16 needs; use run.dtype=bfloat16"
        )


@RULES.reading("optim.state_bits", "optim.offload", "run.backend")
def state_is_whole_on_neuron_cores(c: Config, world: World) -> Iterator[str]:
    chosen = {"optim.state_bits=8": c.optim.state_bits == 8, "optim.offload=true": c.optim.offload}
    if c.run.backend in NEURON_BACKENDS:
        for setting in filter(chosen.__getitem__, chosen):
            yield (
                f"{setting} with run.backend={c.run.backend}: NeuronCores keep the state of AdamW "
                "in their own memory, in 32 bits; leave it out, and cut it over more data ranks"
            )


@RULES.reading("run.patience", "run.validate_every", "run.validate_each_epoch")
def patience_needs_validation(c: Config, world: World) -> Iterator[str]:
    if c.run.patience and not c.run.validates:
        yield (
            f"run.patience={c.run.patience} but nothing is validated; set run.validate_every or "
            "run.validate_each_epoch=true"
        )


@RULES.reading("checkpoint.keep_best", "run.validate_every", "run.validate_each_epoch")
def best_needs_validation(c: Config, world: World) -> Iterator[str]:
    if c.checkpoint.keep_best and not c.run.validates:
        yield (
            "checkpoint.keep_best=true but nothing is validated; set run.validate_every or "
            "run.validate_each_epoch=true"
        )


@RULES.reading("optim.decay_steps", "optim.schedule", "run.steps")
def decay_belongs_to_wsd(c: Config, world: World) -> Iterator[str]:
    schedule, decay = c.optim.schedule, c.optim.decay_steps
    if schedule == "wsd" and not decay:
        yield (
            f"optim.decay_steps=0 with optim.schedule=wsd; "
            f"use 1 to {c.run.steps}, the last fifth of the run for example"
        )
    if schedule != "wsd" and decay:
        yield (
            f"optim.decay_steps={decay} has no effect with optim.schedule={schedule}; "
            f"use 0, or optim.schedule=wsd"
        )


@RULES.reading()
def folders_are_named(c: Config, world: World) -> Iterator[str]:
    for key, value, use in (
        ("data.path", c.data.path, "the folder that llamax prepare wrote"),
        ("run.folder", c.run.folder, "a folder for this run"),
        ("checkpoint.resume", c.checkpoint.resume, "auto, never or a checkpoint folder"),
    ):
        if not value.strip():
            yield f"{key} is empty; use {use}"


@RULES.reading()
def folders_are_paths(c: Config, world: World) -> Iterator[str]:
    for key, value, use in (
        ("data.path", c.data.path, "llamax prepare's folder"),
        ("data.validation", c.data.validation, "llamax prepare's folder"),
        ("run.folder", c.run.folder, "a folder for this run"),
        ("checkpoint.resume", c.checkpoint.resume, "a checkpoint folder"),
        ("checkpoint.init_from", c.checkpoint.init_from, "a folder, or org/name on the Hub"),
    ):
        kind = next(filter(None, map(protocol, value.split())), "")
        if kind and not (kind == "hf" and key == "checkpoint.init_from"):
            yield (
                f"{key}={value} is an address of {kind}, not a path; copy it or mount it here, and "
                f"use {use}"
            )
