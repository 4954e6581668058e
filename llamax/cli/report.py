"""``llamax report RUN [RUN...]``: one self-contained page of HTML about one or several runs.

Curves, throughput, configuration (differences between runs are marked), environment, checkpoints.
Pictures are inline SVG, styles are inline, nothing is loaded: the file can be sent by mail.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from llamax.cli.options import Parser
from llamax.runtime.errors import DataError
from llamax.runtime.files import replace_output
from llamax.runtime.process import run_main
from llamax.runtime.text import print_text


def main(argv: Sequence[str]) -> int:
    """Write the page."""
    parser = Parser(
        prog="llamax report",
        description="Write one self-contained page of HTML about one or several runs.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="page to write")
    options = parser.parse_args(list(argv))

    from llamax.tools.monitor.html_report import MARK, page, with_distinct_names
    from llamax.tools.monitor.run_folder import read_run

    runs = with_distinct_names([read_run(folder) for folder in options.runs])
    try:
        replace_output(options.out, page(runs).encode(), lambda before: MARK in before)
    except OSError as error:
        raise DataError(
            f"{options.out}: cannot be written ({error.strerror}); check --out"
        ) from None
    print_text(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
