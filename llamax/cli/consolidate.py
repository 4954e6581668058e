"""``llamax consolidate CHECKPOINT --out DIR``: a checkpoint becomes a Hugging Face folder.

What goes where is planned first; then processes stream tensors from the ranks' files to their
places in ``model.safetensors`` (or numbered files and an index), each through one slab of 16 MiB,
so memory does not grow with the model.  What is read is checked; the folder gets its name when all
is written.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from llamax.checkpoint import hf_writer
from llamax.checkpoint.consolidate import DTYPES, consolidate, size
from llamax.checkpoint.manifest import find
from llamax.checkpoint.peft import adapter_info
from llamax.checkpoint.reader import Checkpoint
from llamax.runtime.errors import ConfigError
from llamax.runtime.process import summary
from llamax.runtime.units import show_bytes, show_number, show_time


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser("llamax consolidate", description=summary(__doc__))
    parser.add_argument("checkpoint", help="a checkpoint's folder, or a run's (its newest)")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--dtype", choices=DTYPES, help="default: that of the weights")
    parser.add_argument("--max-shard-size", default="5GB", help="bytes per file (default 5GB)")
    parser.add_argument("--tokenizer", help="tokenizer file or folder; default: the dataset's")
    parser.add_argument(
        "--processes", type=int, default=len(os.sched_getaffinity(0)), help="default: one a core"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not check what is read")
    args = parser.parse_args(argv)
    if args.processes < 1:
        raise ConfigError(f"--processes={args.processes} is below 1; use 1 or more")
    source = Checkpoint(find(Path(args.checkpoint)), verify=False)
    dtype = DTYPES[args.dtype] if args.dtype else None
    began = time.perf_counter()
    if adapter_info(source) is not None:
        out = consolidate(source.folder, args.out, verify=not args.no_verify)
        print(f"{out}: the adapters of step {source.step}, as PEFT loads them; see llamax merge")
        return 0
    total = sum(one.size_bytes for one in hf_writer.plan(source, dtype))
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="consolidate", disable=None, leave=False
    ) as bar:
        out = consolidate(
            source.folder,
            args.out,
            dtype,
            size(args.max_shard_size),
            args.tokenizer,
            not args.no_verify,
            bar.update,
            args.processes,
        )
    parameters = sum(math.prod(source.shape(name)) for name in source.names())
    print(
        f"{out}: {show_number(parameters)} parameters of step {source.step}, {show_bytes(total)}, "
        f"in {show_time(time.perf_counter() - began)}"
    )
    if (out / "tokenizer.model").is_file() and not (out / "tokenizer.json").is_file():
        print("its tokenizer.model has no exact tokenizer.json: in transformers ids may differ")
    elif not (out / "tokenizer.json").is_file():
        print("no tokenizer was found for it; --tokenizer adds one")
    return 0
