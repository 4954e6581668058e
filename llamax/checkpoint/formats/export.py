"""``llamax export RUN_OR_FOLDER --to hf|nxd|meta --out DIR``: a model leaves for another trainer.

hf is what ``llamax consolidate`` makes; nxd and meta are the formats that ``llamax import`` reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llamax.checkpoint.formats.nxd_writer import Target, Writer
from llamax.checkpoint.manifest import CONFIG
from llamax.checkpoint.reader import Checkpoint
from llamax.checkpoint.safetensors_io import building
from llamax.checkpoint.source import Source
from llamax.config.load import load_config
from llamax.config.model import ModelConfig
from llamax.config.schema import OptimConfig
from llamax.optim.schedule import lr_at
from llamax.runtime.errors import ConfigError

OPTIMIZERS = ("auto", "none", "zero1", "zero1-masters")


def to_nxd(source: Source, out: Path, target: Target, tag: str = "") -> Path:
    """Write a tag's folder into ``out``; its optimizer has the run's own hyper-parameters."""
    optim, lr, step = OptimConfig(), OptimConfig().lr, 0
    if isinstance(source, Checkpoint):
        step = source.step
        if (source.folder / CONFIG).is_file():
            run = load_config(str(source.folder / CONFIG))
            optim, lr = run.optim, lr_at(max(step, 1), run.optim, max(run.run.steps, step, 1))
    tag = tag or f"step_{step}"
    writer = Writer(source, target, optim, lr, step)
    with building(out) as part:
        writer.write(part / tag)
    return out / tag


def target_of(args: argparse.Namespace, source: Source, model: ModelConfig) -> Target:
    """What the options ask for, with what they leave to the source."""
    kinds = source.kinds("model.norm.weight")
    optimizer = args.optimizer
    if optimizer == "auto":
        optimizer = "zero1-masters" if "exp_avg" in kinds else "none"
    alike = model.num_attention_heads == model.num_key_value_heads
    copies = args.kv_multiplier or model.kv_replicas(args.tensor)
    style = args.qkv or ("stacked" if alike and copies == 1 else "gqa")
    return Target(
        model,
        args.tensor,
        args.pipeline,
        args.data,
        style,
        copies,
        optimizer != "none",
        optimizer == "zero1-masters",
    )


def _check_options(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """ConfigError for an option that the format has no use for."""
    of_nxd = ("pipeline", "data", "qkv", "kv_multiplier", "optimizer")
    for name in {"nxd": (), "meta": of_nxd, "hf": ("tensor", *of_nxd)}[args.to]:
        if getattr(args, name) != parser.get_default(name):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} has no meaning for --to {args.to}; leave it out")
