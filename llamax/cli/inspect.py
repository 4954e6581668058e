"""``llamax inspect PATH``: describe a checkpoint, run, model or adapter folder or dataset.

``--verify`` reads everything and compares it with the hashes that are kept, if there are any.
``--sample 3`` shows samples of a dataset as text, and which part of them is learnt.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from llamax.cli.options import Parser, command, folded
from llamax.runtime.json_writer import to_json
from llamax.runtime.logging import setup_logging
from llamax.runtime.process import summary
from llamax.runtime.text import encodable, print_text

LABEL = r"\S+(?: \S+)* {2,}"  # what stands before a value


def parser() -> Parser:
    """The command line."""
    p = Parser("llamax inspect", description=summary(__doc__))
    p.add_argument("path", help="checkpoint, run, model or adapter folder, dataset or file")
    p.add_argument("--verify", action="store_true", help="read everything, check what can be")
    p.add_argument("--json", action="store_true", help="print it as JSON, for programs")
    p.add_argument("--sample", type=int, default=0, metavar="N", help="show N samples as text")
    p.add_argument("--split", default="train", help="split of the samples (train)")
    p.add_argument(
        "--length",
        type=int,
        default=0,
        metavar="L",
        help="tokens per sample (default: that of a run, or 512)",
    )
    p.add_argument(
        "--seed",
        type=int,
        metavar="S",
        help="the first samples of a run with this run.seed (default: samples spread evenly)",
    )
    p.add_argument(
        "--tokenizer", default="", help="tokenizer file or folder (default: that of the dataset)"
    )
    return p


@command
def main(argv: Sequence[str]) -> int:
    """Print the description, or samples."""
    options = parser().parse_args(argv)
    setup_logging()
    if options.sample:
        return show(options)

    from llamax.tools.inspect.description import as_json, describe, table

    rows = [*describe(options.path, options.verify)]
    if options.json:
        print_text(to_json(as_json(rows)))
    else:
        print_text("\n".join(folded(table(rows).splitlines(), LABEL)))
    return 0


def show(options: argparse.Namespace) -> int:
    """Print samples: in colour on a terminal, between marks elsewhere or with NO_COLOR."""
    from llamax.tools.inspect.samples import read_samples
    from llamax.tools.inspect.show import ASCII_MARKS, MARKS, show_samples

    samples = read_samples(
        options.path,
        options.sample,
        split=options.split,
        length=options.length,
        seed=options.seed,
        tokenizer=options.tokenizer,
    )
    if options.json:
        print_text(to_json([asdict(sample) for sample in samples]))
        return 0
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    marks = MARKS if encodable(MARKS[0], sys.stdout) == MARKS[0] else ASCII_MARKS
    text = show_samples(samples, colour=wanted and sys.stdout.isatty(), marks=marks)
    print(encodable(text, sys.stdout), flush=True)  # its texts went through printable
    return 0
