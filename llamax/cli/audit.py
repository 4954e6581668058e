"""``llamax audit --config llama2-7b --nodes 4``: what a cluster would compile, on any laptop.

Traces the run without devices and without weights, one rank after the other in one process: every
kind of step on rank 0, each program on the ranks at the corners of the mesh, and, with few layers,
each program on every rank of the world (with all layers: ``--ranks deep``).  On Trainium a program
of its own costs a rank 25 to 40 minutes of compilation while all others wait; here it costs a line
that says where it comes from.

The exit code is 0 only if the whole cluster would compile each program once, else 7.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import get_args

from llamax.config.hardware import load_machine
from llamax.config.load import load_config
from llamax.runtime.errors import ConfigError
from llamax.runtime.process import run_main
from llamax.tools.audit.auditor import DIFFERS, Ranks, audit, check_machine
from llamax.tools.audit.report import (
    as_json,
    show,
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="llamax audit",
        usage="%(prog)s --config NAME_OR_PATH [--nodes N] [--instance NAME] "
        "[--ranks all|corners|deep] [--json] [--section.key=value ...]",
        description="Trace a run without devices. Exit code 0 if the whole cluster would compile "
        "each program once, 7 if not.",
        allow_abbrev=False,
    )
    p.add_argument("--config", required=True, help="a recipe's name or a TOML file")
    p.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default 1)")
    p.add_argument("--instance", default="trn1.32xlarge", help="default trn1.32xlarge")
    p.add_argument(
        "--ranks",
        choices=get_args(Ranks),
        default="all",
        help="beside those at the corners of the mesh trace every rank with few layers (default) "
        "or none, or every rank with all layers: seconds a rank",
    )
    p.add_argument("--json", action="store_true", help="numbers for programs")
    return p


def main(argv: Sequence[str]) -> int:
    """Print what was found; 0 if each program is compiled once, ``DIFFERS`` if not."""
    options, overrides = parser().parse_known_args(list(argv))
    if options.nodes < 1:
        raise ConfigError(f"--nodes={options.nodes} is out of range; use 1 or more")
    machine = load_machine(options.instance)
    check_machine(load_config(options.config, overrides), machine)
    world = options.nodes * machine.ranks
    config = load_config(options.config, overrides, world)
    found = audit(config, machine, options.nodes, options.ranks)
    if options.json:
        print(json.dumps(as_json(found), indent=2))
    else:
        print("\n".join(show(found)))
    sys.stdout.flush()
    if found.passes:
        if not options.json:
            print("each program compiles once for the whole cluster")
        return 0
    for problem in found.problems:
        print(f"llamax: {problem}", file=sys.stderr)
    return DIFFERS


if __name__ == "__main__":
    sys.exit(run_main(main))
