"""``llamax shard HUB_FOLDER --out DIR --tensor 8``: a Hugging Face Llama becomes a checkpoint.

The reverse of ``consolidate``: each tensor rank's file takes its strips of every tensor, two files
at a time, each through a slab of 16 MiB.  The checkpoint has weights only, in the folder's dtype.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from tqdm import tqdm

from llamax.checkpoint import hf_folder
from llamax.checkpoint.shard_hf import shard
from llamax.runtime.errors import ConfigError
from llamax.runtime.process import summary
from llamax.runtime.units import show_bytes, show_time


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser("llamax shard", description=summary(__doc__))
    parser.add_argument("folder", help="a Hugging Face folder with a Llama in safetensors files")
    parser.add_argument("--out", required=True, help="checkpoint folder to make")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel degree (default 1)")
    args = parser.parse_args(argv)
    if args.tensor < 1:
        raise ConfigError(f"--tensor={args.tensor} is below 1; use 1 or more")
    total, began = hf_folder.HubFolder(args.folder).total_bytes(), time.perf_counter()
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="shard", disable=None, leave=False
    ) as bar:
        out = shard(args.folder, args.out, args.tensor, bar.update)
    print(
        f"{out}: {show_bytes(total)} of weights for tensor {args.tensor}, in "
        f"{show_time(time.perf_counter() - began)}; train loads it on any mesh"
    )
    return 0
