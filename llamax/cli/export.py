"""``llamax export RUN_OR_FOLDER --to hf|nxd|meta --out DIR``: a model leaves for another trainer.

hf is what ``llamax consolidate`` makes; nxd and meta are the formats that ``llamax import`` reads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from llamax.checkpoint.consolidate import consolidate
from llamax.checkpoint.formats.export import OPTIMIZERS, _check_options, target_of, to_nxd
from llamax.checkpoint.formats.meta_writer import write_meta
from llamax.checkpoint.formats.nxd_writer import STYLES
from llamax.checkpoint.hf_folder import open_source
from llamax.checkpoint.reader import Checkpoint
from llamax.checkpoint.safetensors_io import building
from llamax.config.model import ModelConfig
from llamax.runtime.errors import ConfigError
from llamax.runtime.process import summary
from llamax.runtime.units import show_time


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
    model = ModelConfig.from_hub(source.model)
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
