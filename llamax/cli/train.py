"""``llamax train --config NAME_OR_PATH``: train a model; torchrun starts one program per rank.

``llamax.train`` is the run itself.  It imports torch, so it is imported after the command line and
the configuration are read.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from functools import partial

from llamax.cli.options import Parser, number
from llamax.config.load import help_text, load_config
from llamax.parallel.rendezvous import rendezvous, report_errors_once
from llamax.runtime import signals
from llamax.runtime.errors import ConfigError
from llamax.runtime.logging import setup_logging
from llamax.training.local_ranks import run_ranks


def parser() -> Parser:
    """The command line."""
    p = Parser(
        prog="llamax train",
        usage="%(prog)s --config NAME_OR_PATH [--ranks N] [--precompile]\n"
        "                    [--section.key=value ...]",
        description="Train a Llama. Under torchrun, mpirun or srun every rank runs this program;\n"
        "--ranks starts all ranks on this machine; otherwise it is a world of one.",
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--config", default="", help="a recipe's name or a TOML file")
    p.add_argument("--ranks", type=number, metavar="N", help="number of ranks to start here")
    p.add_argument(
        "--precompile",
        action="store_true",
        help="trace and compile the programs of the run and end; for neuron_parallel_compile",
    )
    return p


def main(argv: Sequence[str]) -> int:
    """``--config NAME_OR_PATH [--section.key=value ...]``; ``--help`` lists every key."""
    p = parser()
    options, overrides = p.parse_known_args(list(argv))
    for word in overrides:
        if word.startswith("--") and "." not in word.partition("=")[0] and p.nearest(word):
            p.error(f"{word} is an unknown option")
    if not options.config:
        p.error("--config is missing; give a recipe's name or a TOML file")
    where = rendezvous(os.environ)
    setup_logging(f"rank {where.rank}", main=where.rank == 0 and not options.ranks)  # rank 0 logs
    with report_errors_once(where):
        if options.ranks == 0:
            raise ConfigError("--ranks 0 is out of range; use 1 or more, or leave it out")
        if options.ranks and where.launcher:
            raise ConfigError(
                f"--ranks {options.ranks} in a program that {where.launcher} started; leave it out"
            )
        config = load_config(options.config, overrides, options.ranks or where.world_size)
    if options.ranks:  # this process forks: numpy's OpenBLAS should start no threads in it
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    from llamax.tools.audit import precompile
    from llamax.train import train

    if options.ranks:
        words = ["--config", options.config, *["--precompile"] * options.precompile, *overrides]
        return run_ranks(partial(_run_rank, words), options.ranks, os.environ)
    if options.precompile or precompile.asked(os.environ):
        precompile.precompile(config, where, os.environ)
        return 0
    try:
        train(config, where)
    finally:
        signals.rest()
    return 0


def _run_rank(words: Sequence[str], variables: Mapping[str, str]) -> int:
    """The training program of one rank, which has a process and an environment of its own."""
    os.environ.clear()
    os.environ.update(variables)
    return main(words)
