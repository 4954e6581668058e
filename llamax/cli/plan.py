"""``llamax plan --config llama2-7b --nodes 16``: bytes, seconds and dollars before paying for them.

::

    memory of a rank: 10.6 GiB of 16 GiB, fits; fullest when forward has ended
      weights          1.57 GiB   2 B x 843M elements
      ...
    time of a step: 11s for 4.19M tokens
      matmuls             6.10s   16 microsteps x 20.3TFLOP / (56% of 95TFLOP/s)
      ...
    389K tokens/s (760 a rank), MFU 34.3%
    2.01T tokens in 480,000 steps: 59d20h, $494,146 at $344.00 an hour

Each line says where it comes from.  The exit code is 0 if the plan fits into memory and 6 if not.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace

from llamax.config.hardware import default_machine, load_machine, machine_names
from llamax.config.load import load_config
from llamax.config.schema import Config
from llamax.runtime.errors import ConfigError
from llamax.runtime.process import run_main
from llamax.tools.plan import plan, search
from llamax.tools.plan.report import as_json, show, show_search

DOES_NOT_FIT = 6


def read(name: str, overrides: Sequence[str], world: int | None) -> Config:
    """The configuration; ConfigError with the first thing that is wrong with it in that world."""
    try:
        return load_config(name, overrides, world)
    except ConfigError as error:
        head, *problems = str(error).split("\n  ")
        if not problems:
            raise
        where = head.rpartition(":")[0]
        raise ConfigError(f"{where}: {problems[0]}; and {len(problems) - 1} more") from None


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="llamax plan",
        usage="%(prog)s --config NAME_OR_PATH [--nodes N] [--instance NAME_OR_TOML] [--search] "
        "[--json] [--section.key=value ...]",
        description="Say what a run needs and how long it takes, by arithmetic. Exit code 0 if it "
        "fits into memory, 6 if not.",
        allow_abbrev=False,
    )
    p.add_argument("--config", required=True, help="a recipe's name or a TOML file")
    p.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default 1)")
    p.add_argument(
        "--instance",
        help=f"{', '.join(machine_names())} or a TOML file; default by run.backend",
    )
    p.add_argument("--ranks", type=int, metavar="N", help="ranks of a node (default: all devices)")
    p.add_argument("--dollars-per-hour", type=float, metavar="D", help="price of a node")
    p.add_argument("--search", action="store_true", help="list the layouts that fit, best first")
    p.add_argument("--json", action="store_true", help="numbers for programs")
    return p


def main(argv: Sequence[str]) -> int:
    """Print the plan; 0 if it fits, ``DOES_NOT_FIT`` if not."""
    options, overrides = parser().parse_known_args(list(argv))
    for name, value in (("--nodes", options.nodes), ("--ranks", options.ranks)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} is out of range; use 1 or more")
    dollars = options.dollars_per_hour
    if dollars is not None and not 0 <= dollars < math.inf:
        raise ConfigError(f"--dollars-per-hour={dollars:g} is out of range; use 0 or more")
    backend = read(options.config, overrides, None).run.backend
    machine = load_machine(options.instance or default_machine(backend))
    if options.ranks:
        machine = machine.with_ranks(options.ranks)
    if dollars is not None:
        machine = replace(machine, dollars_per_hour=dollars)
    world = None if options.search else options.nodes * machine.ranks
    config = read(options.config, overrides, world)
    if options.search:
        plans, refused = search(config, machine, options.nodes)
        fits = bool(plans) and plans[0].memory.fits
        if options.json:
            text = json.dumps([as_json(each) for each in plans], indent=2)
        else:
            text = "\n".join(show_search(plans, refused))
    else:
        found = plan(config, machine, options.nodes)
        fits = found.memory.fits
        text = json.dumps(as_json(found), indent=2) if options.json else "\n".join(show(found))
    print(text)
    return 0 if fits else DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(run_main(main))
