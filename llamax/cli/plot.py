"""``llamax plot RUN...``: draw the loss curves of one or several runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from llamax.cli.options import Parser, command
from llamax.runtime.process import run_main
from llamax.runtime.text import print_text


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="llamax plot", description="Draw the loss curves of one or several runs.")
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    p.add_argument("--out", type=Path, default=Path("loss.png"), help="picture to write")
    p.add_argument("--reference", type=float, help="loss of a horizontal line, in nats")
    p.add_argument("--reference-name", default="reference", help="name of that line")
    return p


@command
def main(argv: Sequence[str]) -> int:
    """Draw the picture."""
    options = parser().parse_args(argv)

    from llamax.tools.monitor.plot import draw, read_runs

    line = None if options.reference is None else (options.reference_name, options.reference)
    draw(read_runs(options.runs), options.out, line)
    print_text(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
