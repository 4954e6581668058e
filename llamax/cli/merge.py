"""``llamax merge [BASE] ADAPTER --out DIR``: merge a base and its adapters to a Hugging
Face folder.

The merged weights are W + s B A, in the dtype of the base unless ``--dtype`` says otherwise; the
sum is taken in fp32 and rounded once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from llamax.cli.options import Parser, command
from llamax.config.choices import WEIGHT_DTYPES
from llamax.runtime.logging import setup_logging
from llamax.runtime.process import summary
from llamax.runtime.progress import Progress
from llamax.runtime.text import print_text
from llamax.runtime.units import show_bytes, show_number, show_time


def parser() -> Parser:
    """The command line."""
    p = Parser("llamax merge", description=summary(__doc__))
    p.add_argument(
        "base", nargs="?", help="Hugging Face folder, run or checkpoint; default: the adapter's own"
    )
    p.add_argument("adapter", help="PEFT folder, or a run or checkpoint of adapters")
    p.add_argument("--out", required=True, help="folder to make")
    p.add_argument("--dtype", choices=WEIGHT_DTYPES, help="default: that of the base")
    return p


@command
def main(argv: Sequence[str]) -> int:
    """Write the merged folder."""
    options = parser().parse_args(argv)
    setup_logging()

    from llamax.checkpoint.hf_folder import HfFolder
    from llamax.checkpoint.merge import merge

    began = time.perf_counter()
    with Progress("merge") as bar:
        out = merge(
            options.adapter,
            options.out,
            base=options.base,
            dtype=options.dtype,
            started=bar.start,
            progress=bar.update,
        )
    folder = HfFolder(out)
    parameters = sum(math.prod(folder.shape(name)) for name in folder.names())
    print_text(
        f"{out}: {show_number(parameters)} parameters, {show_bytes(folder.total_bytes())}, in "
        f"{show_time(time.perf_counter() - began)}"
    )
    return 0
