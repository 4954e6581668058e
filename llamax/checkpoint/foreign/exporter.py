"""``llamax export RUN_OR_FOLDER --to hf|nxd|meta --out DIR``: a model leaves for another trainer.

hf is what ``llamax consolidate`` makes; nxd and meta are the formats that ``llamax import`` reads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from llamax import configfile
from llamax.checkpoint.consolidate import consolidate
from llamax.checkpoint.container import building
from llamax.checkpoint.foreign.write_meta import write_meta
from llamax.checkpoint.foreign.write_nxd import STYLES, Target, Writer
from llamax.checkpoint.hub import open_source
from llamax.checkpoint.load import Checkpoint, Source
from llamax.checkpoint.manifest import CONFIG
from llamax.config import Model, Optim
from llamax.errors import ConfigError
from llamax.metrics import show_time
from llamax.optim.schedule import lr_at
from llamax.program import summary

OPTIMIZERS = ("auto", "none", "zero1", "zero1-masters")


def to_nxd(source: Source, out: Path, target: Target, tag: str = "") -> Path:
    """Write a tag's folder into ``out``; its optimizer has the run's own hyper-parameters."""
    optim, lr, step = Optim(), Optim().lr, 0
    if isinstance(source, Checkpoint):
        step = source.step
        if (source.folder / CONFIG).is_file():
            run = configfile.load(str(source.folder / CONFIG))
            optim, lr = run.optim, lr_at(max(step, 1), run.optim, max(run.run.steps, step, 1))
    tag = tag or f"step_{step}"
    writer = Writer(source, target, optim, lr, step)
    with building(out) as part:
        writer.write(part / tag)
    return out / tag


def target_of(args: argparse.Namespace, source: Source, model: Model) -> Target:
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


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser("llamax export", description=summary(__doc__))
    parser.add_argument("source", help="a run, a checkpoint's folder or a Hugging Face folder")
    parser.add_argument("--to", required=True, choices=("hf", "nxd", "meta"))
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--tensor", type=int, default=1, help="tensor ranks (default 1)")
    parser.add_argument("--pipeline", type=int, default=1, help="nxd: stages (default 1)")
    parser.add_argument("--data", type=int, default=1, help="nxd: data ranks of ZeRO-1 (default 1)")
    parser.add_argument(
        "--qkv", choices=STYLES, help="nxd: how attention is held; default by heads"
    )
    parser.add_argument(
        "--kv-multiplier", type=int, default=0, help="nxd: copies of key/value heads; default fits"
    )
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="auto", help="nxd: default: what there is"
    )
    args = parser.parse_args(argv)
    _check_options(args, parser)
    began, out = time.perf_counter(), Path(args.out)
    source = open_source(args.source)
    model = Model.from_hub(source.model)
    if args.to == "hf":
        if not isinstance(source, Checkpoint):
            raise ConfigError(f"{args.source} is a Hugging Face folder already; copy it")
        consolidate(source.folder, out)
    elif args.to == "nxd":
        out = to_nxd(source, out, target_of(args, source, model))
    else:
        with building(out) as part:
            write_meta(source, model, part, args.tensor)
    print(f"{out}: written for {args.to} in {show_time(time.perf_counter() - began)}")
    return 0
