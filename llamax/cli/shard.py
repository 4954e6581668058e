"""``llamax shard HUB_FOLDER --out DIR --tensor 8``: cut a Hugging Face Llama into a checkpoint.

The reverse of ``llamax consolidate``.  The checkpoint has weights only, in the folder's dtype.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from llamax.cli.options import Parser, command
from llamax.runtime.logging import setup_logging
from llamax.runtime.process import summary
from llamax.runtime.progress import Progress
from llamax.runtime.text import print_text
from llamax.runtime.units import show_bytes, show_time


def parser() -> Parser:
    """The command line."""
    p = Parser("llamax shard", description=summary(__doc__))
    p.add_argument("folder", help="a Hugging Face folder with a Llama in safetensors files")
    p.add_argument("--out", required=True, help="checkpoint folder to make")
    p.add_argument("--tensor", type=int, default=1, help="tensor-parallel degree (default 1)")
    return p


@command
def main(argv: Sequence[str]) -> int:
    """Write the checkpoint."""
    options = parser().parse_args(argv)
    setup_logging()

    from llamax.checkpoint.hf_folder import HfFolder
    from llamax.checkpoint.shard_hf import shard

    total, began = HfFolder(options.folder).total_bytes(), time.perf_counter()
    with Progress("shard", total) as bar:
        out = shard(options.folder, options.out, options.tensor, progress=bar.update)
    print_text(
        f"{out}: {show_bytes(total)} of weights for tensor {options.tensor}, in "
        f"{show_time(time.perf_counter() - began)}; train loads it on any mesh"
    )
    return 0
