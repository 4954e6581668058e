"""``llamax plan --config llama2-7b --nodes 16``: memory, time and cost of a run, by arithmetic.

::

    memory of a rank: 10.6 GiB of 16 GiB, fits; fullest when forward has ended
      weights          1.57 GiB   2 B x 843M elements
      ...
    time of a step: 11s for 4.19M tokens
      matmuls             6.10s   16 microsteps x 20.3TFLOP / (56% of 95TFLOP/s)
      ...
    389K tokens/s (760 a rank), MFU 34.3%
    2.01T tokens in 480,000 steps: 59d20h, $494,146 at $344.00 an hour

Each line has its formula.  The exit code is 0 if the plan fits into memory and 6 if not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llamax.cli.options import command
from llamax.config.hardware import machine_names
from llamax.runtime.json_writer import to_json
from llamax.runtime.process import run_main
from llamax.runtime.text import print_text

DOES_NOT_FIT = 6


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="llamax plan",
        usage="%(prog)s --config NAME_OR_PATH [--nodes N] [--instance NAME_OR_TOML] [--search] "
        "[--json] [--section.key=value ...]",
        description="Memory, time and cost of a run, by arithmetic. Exit code 0 if it fits into "
        "memory, 6 if not.",
        allow_abbrev=False,
    )
    p.add_argument("--config", required=True, help="a recipe's name or a TOML file")
    p.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default 1)")
    p.add_argument(
        "--instance",
        help=f"{', '.join(machine_names())} or a TOML file; default by run.backend",
    )
    p.add_argument("--ranks", type=int, metavar="N", help="ranks per node (default: all devices)")
    p.add_argument("--dollars-per-hour", type=float, metavar="D", help="price of a node")
    p.add_argument("--search", action="store_true", help="list the layouts that fit, best first")
    p.add_argument("--json", action="store_true", help="print the numbers as JSON")
    return p


@command
def main(argv: Sequence[str]) -> int:
    """Print the plan; 0 if it fits, ``DOES_NOT_FIT`` if not."""
    options, overrides = parser().parse_known_args(list(argv))

    from llamax.tools.plan import place, plan, search
    from llamax.tools.plan.report import as_json, show, show_search

    config, machine = place(
        options.config,
        options.instance or "",
        options.nodes,
        ranks=options.ranks,
        dollars_per_hour=options.dollars_per_hour,
        overrides=overrides,
        any_layout=options.search,
    )
    if options.search:
        plans, refused = search(config, machine, options.nodes)
        fits = bool(plans) and plans[0].memory.fits
        if options.json:
            text = to_json([as_json(found) for found in plans])
        else:
            text = "\n".join(show_search(plans, refused))
    else:
        found = plan(config, machine, options.nodes)
        fits = found.memory.fits
        text = to_json(as_json(found)) if options.json else "\n".join(show(found))
    print_text(text)
    return 0 if fits else DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(run_main(main))
