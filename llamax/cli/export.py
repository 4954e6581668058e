"""``llamax export RUN_OR_FOLDER --to hf|nxd|meta --out DIR``: write a model for another trainer.

hf is what ``llamax consolidate`` makes; nxd and meta are formats that ``llamax import`` reads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from llamax.cli.options import Parser, command
from llamax.config.choices import EXPORT_FORMATS, NXD_ATTENTION, NXD_OPTIMIZERS
from llamax.runtime.logging import setup_logging
from llamax.runtime.process import summary
from llamax.runtime.progress import Progress
from llamax.runtime.text import print_text
from llamax.runtime.units import show_time


def parser() -> Parser:
    """The command line."""
    p = Parser("llamax export", description=summary(__doc__))
    p.add_argument("source", help="a run, a checkpoint's folder or a Hugging Face folder")
    p.add_argument("--to", required=True, choices=EXPORT_FORMATS, help="format to write")
    p.add_argument("--out", required=True, help="folder to make")
    p.add_argument("--tensor", type=int, default=1, help="tensor ranks (default 1)")
    p.add_argument("--pipeline", type=int, default=1, help="nxd: stages (default 1)")
    p.add_argument("--data", type=int, default=1, help="nxd: data ranks of ZeRO-1 (default 1)")
    p.add_argument(
        "--qkv",
        choices=NXD_ATTENTION,
        default="",
        help="nxd: layout of the attention weights; default by heads",
    )
    p.add_argument(
        "--kv-multiplier",
        type=int,
        default=0,
        help="nxd: copies of key/value heads; default: as many as --tensor needs",
    )
    p.add_argument(
        "--optimizer",
        choices=NXD_OPTIMIZERS,
        default="auto",
        help="nxd: optimizer state to write; default: what there is",
    )
    p.add_argument(
        "--tag", default="", help="nxd: name of the checkpoint's folder (default step_N)"
    )
    p.add_argument("--xser", action="store_true", help="nxd: one file per tensor (use_xser)")
    return p


@command
def main(argv: Sequence[str]) -> int:
    """Write the model."""
    options = parser().parse_args(argv)
    setup_logging()

    from llamax.checkpoint.formats.export import export

    began = time.perf_counter()
    with Progress("export") as bar:
        out = export(
            options.source,
            options.out,
            to=options.to,
            tensor=options.tensor,
            pipeline=options.pipeline,
            data=options.data,
            qkv=options.qkv,
            kv_multiplier=options.kv_multiplier,
            optimizer=options.optimizer,
            tag=options.tag,
            xser=options.xser,
            started=bar.start,
            progress=bar.update,
        )
    print_text(f"{out}: written for {options.to} in {show_time(time.perf_counter() - began)}")
    return 0
