"""``llamax import FOLDER --from nxd|optimum|nemo|meta|auto --out DIR``: convert another trainer's
checkpoint to a Hugging Face folder, or to a llamax checkpoint.

Numbers are copied bit by bit, in the dtype they have.  Pickles are read without executing them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from llamax.cli.options import Parser, command
from llamax.config.choices import FOREIGN_FORMATS
from llamax.runtime.logging import setup_logging
from llamax.runtime.process import summary
from llamax.runtime.progress import Progress
from llamax.runtime.text import print_text
from llamax.runtime.units import show_bytes, show_time


def parser() -> Parser:
    """The command line."""
    p = Parser("llamax import", description=summary(__doc__))
    p.add_argument("folder", help="another trainer's checkpoint")
    p.add_argument(
        "--from",
        dest="format",
        choices=("auto", *FOREIGN_FORMATS),
        default="auto",
        help="format of the checkpoint (default: what its files show)",
    )
    p.add_argument("--out", required=True, help="folder to make")
    p.add_argument(
        "--to",
        choices=("hub", "llamax"),
        default="hub",
        help="a Hugging Face folder or a llamax checkpoint (default hub)",
    )
    p.add_argument("--config", default="", help="config.json or recipe, if the folder has none")
    p.add_argument("--weights-only", action="store_true", help="leave the optimizer out")
    p.add_argument(
        "--consumed-sequences",
        type=int,
        default=0,
        help="samples the training had seen (default 0)",
    )
    p.add_argument("--step", type=int, help="step to read, if there are several; default newest")
    p.add_argument("--max-shard-size", default="5GB", help="bytes per file (default 5GB)")
    return p


@command
def main(argv: Sequence[str]) -> int:
    """Write the folder or checkpoint."""
    options = parser().parse_args(argv)
    setup_logging()

    from llamax.checkpoint.formats.convert import import_checkpoint

    began = time.perf_counter()
    with Progress("import") as bar:
        made = import_checkpoint(
            options.folder,
            options.out,
            format=options.format,
            to=options.to,
            config=options.config,
            weights_only=options.weights_only,
            consumed_sequences=options.consumed_sequences,
            step=options.step,
            max_shard_size=options.max_shard_size,
            started=bar.start,
            progress=bar.update,
        )
    print_text(
        f"{made.folder}: {', '.join(made.kinds)} of {made.tensors} tensors, "
        f"{show_bytes(made.size_bytes)}, in {show_time(time.perf_counter() - began)}"
        + (f"; read {made.origin}" if made.origin else "")
        + (f", step {made.step}" if made.step else "")
    )
    return 0
