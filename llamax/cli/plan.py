"""``llamax plan --config llama2-7b --nodes 16``: memory, time and cost of a run, by arithmetic.

::

    memory of a rank: 10.6 GiB of 16 GiB, fits; fullest when forward has ended
      weights          1.57 GiB   2 B x 843M elements
      ...
    time of a step: 11s for 4.19M tokens
      matmuls             6.10s   16 microsteps x 20.3 TFLOP / (56% of 95 TFLOP/s)
      ...
    389K tokens/s (760 a rank), MFU 34.3%
    2.01T tokens in 480,000 steps: 59d20h, $494,146 at $344.00 an hour

Each line has its formula.  The exit code is 0 if the plan fits into memory and 6 if not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from llamax.cli.options import Parser, batch_length, command, folded, number, with_options
from llamax.config.hardware import machine_names
from llamax.runtime.errors import ConfigError
from llamax.runtime.json_writer import to_json
from llamax.runtime.process import run_main
from llamax.runtime.text import print_text

DOES_NOT_FIT = 6
FORMULA = r"  .{34} .{9}   "  # what stands before a formula


def parser() -> Parser:
    """The command line."""
    p = Parser(
        prog="llamax plan",
        usage="%(prog)s --config NAME_OR_PATH [--nodes N] [--instance NAME_OR_TOML]\n"
        "                   [--tokens N] [--search] [--generate BATCHxLENGTH] [--json]\n"
        "                   [--section.key=value ...]",
        description="Memory, time and cost of a run, by arithmetic. Exit code 0 if it fits into "
        "memory, 6 if not.",
        allow_abbrev=False,
    )
    p.add_argument("--config", required=True, help="a recipe's name or a TOML file")
    p.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default 1)")
    p.add_argument(
        "--instance",
        help=f"{', '.join(machine_names())} or a TOML file (FILE.toml:NAME for one machine "
        "of several); default by run.backend",
    )
    p.add_argument("--ranks", type=int, metavar="N", help="ranks per node (default: all devices)")
    p.add_argument("--dollars-per-hour", type=float, metavar="D", help="price of a node")
    for name, what in (
        ("steps", "length of the run in optimizer steps, instead of the configuration's"),
        ("tokens", "the same in tokens, such as 300B or 3e11, rounded up to a whole step"),
        ("epochs", "the same in passes over the data set"),
        ("samples", "samples in an epoch, where the data set is not here; alone: one epoch"),
    ):
        p.add_argument(f"--{name}", type=number, metavar="N", help=what)
    p.add_argument("--search", action="store_true", help="list the layouts that fit, best first")
    p.add_argument(
        "--generate",
        type=batch_length,
        metavar="BATCHxLENGTH",
        help="memory and time of llamax generate --backend xla instead, on parallel.tensor ranks",
    )
    p.add_argument("--json", action="store_true", help="print the numbers as JSON")
    return p


@command
def main(argv: Sequence[str]) -> int:
    """Print the plan; 0 if it fits, ``DOES_NOT_FIT`` if not."""
    options, overrides = parser().parse_known_args(list(argv))
    if options.generate is not None:
        return generation(options, overrides)

    from llamax.tools.plan import GivenLength, length_of, nearest, place, plan_length, search
    from llamax.tools.plan.report import (
        as_json,
        nearest_as_json,
        show,
        show_nearest,
        show_search,
    )

    given = GivenLength(options.steps, options.tokens, options.epochs, options.samples)
    given.check(overrides)
    chosen = partial(
        place,
        options.config,
        options.instance or "",
        options.nodes,
        ranks=options.ranks,
        dollars_per_hour=options.dollars_per_hour,
        overrides=overrides,
    )
    try:
        config, machine = chosen(any_layout=options.search)
    except ConfigError as error:
        if options.search:
            raise
        near = nearest(*chosen(any_layout=True), options.nodes)
        if near is not None and near.fits:
            hint = f"the nearest layout that fits is {' '.join(near.flags)}"
        else:
            (hint,) = show_nearest(near)
        raise ConfigError(f"{error}; {hint}") from None
    length = length_of(config, given)
    if options.search:
        plans, refused = search(config, machine, options.nodes, length)
        numbers: dict[str, object] = {"layouts": [as_json(each) for each in plans]}
        lines = [*show_search(config, plans, refused)]
    else:
        plans = [plan_length(length, machine, options.nodes, machine.node_limit)]
        numbers, lines = as_json(plans[0]), [*show(plans[0])]
    fits = bool(plans) and plans[0].memory.fits
    if not fits:
        near = nearest(config, machine, options.nodes, length)
        lines += show_nearest(near)
        numbers["nearest"] = nearest_as_json(near)
    if options.json:
        print_text(to_json(numbers))
    else:
        print_text("\n".join(folded(map(with_options, lines), FORMULA)))
    return 0 if fits else DOES_NOT_FIT


def generation(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print the plan of generating; 0 if it fits, ``DOES_NOT_FIT`` if not."""
    from llamax.tools.plan.generation import generation_as_json, plan_generation, show_generation

    batch, length = options.generate
    plan = plan_generation(
        options.config, batch, length, options.instance or "", overrides=overrides
    )
    if options.json:
        print_text(to_json(generation_as_json(plan)))
    else:
        print_text("\n".join(folded(show_generation(plan), FORMULA)))
    return 0 if plan.fits else DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(run_main(main))
