"""``llamax merge [BASE] ADAPTER --out DIR``: a base and its adapters become a Hugging Face folder.

A merge is a source whose weights are W + s B A, in the dtype of the base: whatever reads a model
from files can read it, and here it is read into new files a slab of rows at a time.  The sum is
taken in fp32 and rounded once.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence

from tqdm import tqdm

from llamax.checkpoint import hf_folder
from llamax.checkpoint.merge import DTYPES, merge
from llamax.runtime.process import summary
from llamax.runtime.units import show_bytes, show_number, show_time


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser("llamax merge", description=summary(__doc__))
    parser.add_argument(
        "base", nargs="?", help="Hugging Face folder, run or checkpoint; default: the adapter's own"
    )
    parser.add_argument("adapter", help="PEFT folder, or a run or checkpoint of adapters")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--dtype", choices=DTYPES, help="default: that of the base")
    args = parser.parse_args(argv)
    dtype = DTYPES[args.dtype] if args.dtype else None
    began = time.perf_counter()
    with tqdm(unit="B", unit_scale=True, desc="merge", disable=None, leave=False) as bar:
        out = merge(args.base, args.adapter, args.out, dtype, progress=bar.update)
    made = hf_folder.HubFolder(out)
    parameters = sum(math.prod(made.shape(name)) for name in made.names())
    print(
        f"{out}: {show_number(parameters)} parameters, {show_bytes(made.total_bytes())}, in "
        f"{show_time(time.perf_counter() - began)}"
    )
    return 0
