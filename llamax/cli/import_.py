"""``llamax import FOLDER --from nxd|optimum|nemo|meta|auto --out DIR``: another trainer's
checkpoint becomes a Hugging Face folder, or one of ours.

::

    nxd, optimum, nemo, meta  ->  one Hub tensor at a time  ->  hub      weights
                                                            ->  llamax   weights, and the optimizer
                                                                         where it was kept

Numbers are copied bit by bit, in the dtype they have.  The pickles are read by ``pickles``, which
executes nothing, and only here.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from llamax.checkpoint.consolidate import size
from llamax.checkpoint.formats.convert import FORMATS, open_folder, size_bytes, to_hub, to_llamax
from llamax.runtime.errors import ConfigError
from llamax.runtime.process import summary
from llamax.runtime.units import show_bytes, show_time


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser("llamax import", description=summary(__doc__))
    parser.add_argument("folder", help="another trainer's checkpoint")
    parser.add_argument("--from", dest="form", choices=("auto", *FORMATS), default="auto")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--to", choices=("hub", "llamax"), default="hub", help="default hub")
    parser.add_argument("--config", default="", help="config.json or recipe, where none is beside")
    parser.add_argument("--weights-only", action="store_true", help="leave the optimizer out")
    parser.add_argument(
        "--consumed-sequences",
        type=int,
        default=0,
        help="samples the training had seen (default 0)",
    )
    parser.add_argument("--max-shard-size", default="5GB", help="bytes per file (default 5GB)")
    args = parser.parse_args(argv)
    if args.consumed_sequences < 0:
        raise ConfigError(f"--consumed-sequences={args.consumed_sequences} is below 0")
    began, out, shard_bytes = time.perf_counter(), Path(args.out), size(args.max_shard_size)
    source = open_folder(Path(args.folder), args.form, args.config, not args.weights_only)
    kinds = source.kinds if args.to == "llamax" else ("weight",)
    total = sum(size_bytes(source, name, kind) for name in source.shapes for kind in kinds)
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="import", disable=None, leave=False
    ) as bar:
        if args.to == "hub":
            to_hub(source, out, shard_bytes, bar.update)
        else:
            to_llamax(source, out, args.consumed_sequences, bar.update)
    print(
        f"{out}: {', '.join(kinds)} of {len(source.shapes)} tensors, step {source.step}, "
        f"{show_bytes(total)}, in {show_time(time.perf_counter() - began)}"
    )
    return 0
