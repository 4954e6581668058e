"""``llamax cache``: copies compiled programs between this machine and a cache that others share.

::

    llamax cache push --place s3://bucket/neuron-cache        what is compiled here, for others
    llamax cache pull --place s3://bucket/neuron-cache        what is missing here
    llamax cache fill --place s3://bucket/neuron-cache -- neuron_parallel_compile torchrun ...

``fill`` pulls, runs the command and pushes what it compiled.  ``llamax launch`` does so in its
phase precompile, and pulls before training, if the job file sets ``compile_cache``.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from llamax.cli.launch import run_command
from llamax.cli.options import Parser
from llamax.runtime.address import CACHES, problem, protocol
from llamax.runtime.errors import BackendError, ConfigError
from llamax.runtime.process import run_main
from llamax.runtime.text import print_text
from llamax.runtime.versions import installed
from llamax.tools.audit.cache_place import Place
from llamax.tools.audit.shared_cache import (
    CompileTime,
    compiler_folder,
    lines,
    modules,
    pull,
    push,
    write_time,
)

NEURON_DEFAULT = "/var/tmp/neuron-compile-cache"
ACTIONS = ("push", "pull", "fill")


def main(argv: Sequence[str]) -> int:
    """Copy, and print what was copied; 2 if something was left out, or the command's exit code."""
    parser = Parser(
        prog="llamax cache",
        usage="%(prog)s push|pull --place PLACE [--cache FOLDER]\n"
        "       %(prog)s fill --place PLACE [--cache FOLDER] -- COMMAND ...",
        description="Copy compiled programs between this machine and a cache that others share.",
        allow_abbrev=False,
    )
    parser.add_argument("action", choices=ACTIONS, help="fill: pull, run COMMAND, push")
    parser.add_argument(
        "--place", required=True, help="a folder, or s3://bucket/path, hf://datasets/org/name, ..."
    )
    parser.add_argument(
        "--cache",
        metavar="FOLDER",
        help=f"Neuron's compile cache (NEURON_COMPILE_CACHE_URL, or {NEURON_DEFAULT})",
    )
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    options, command = parser.parse_args(words[:end]), words[end + 1 :]
    if (options.action == "fill") != bool(command):
        raise ConfigError(
            "fill needs a command after --, such as -- neuron_parallel_compile torchrun ..."
            if options.action == "fill"
            else f"{options.action} runs no command; use fill, or leave out -- and what follows"
        )
    if protocol(options.place) and (why := problem(options.place, CACHES)):
        raise ConfigError(f"--place {options.place} {why}")
    folder = options.cache or os.environ.get("NEURON_COMPILE_CACHE_URL") or NEURON_DEFAULT
    if "://" in folder:
        raise ConfigError(f"the compile cache {folder} is not a folder; set --cache")
    cache = Path(folder)
    if options.action == "fill":
        return fill(options.place, cache, command)
    if options.action == "push" and not cache.is_dir():
        raise ConfigError(f"there is no compile cache {cache}; set --cache to its folder")
    place = Place(options.place)
    return _pull(place, cache) if options.action == "pull" else _push(place, cache)


def _pull(place: Place, cache: Path) -> int:
    report = pull(place, cache, installed("neuronx-cc"))
    print_text("\n".join(lines(report, "took", f"from {place.url}")))
    return 2 if report.refused else 0


def _push(place: Place, cache: Path) -> int:
    report = push(cache, place)
    print_text("\n".join(lines(report, "sent", f"to {place.url}")))
    return 2 if report.refused else 0


def fill(url: str, cache: Path, command: Sequence[str]) -> int:
    """Pull, run a command that compiles, and push; the exit code of the command if it fails.

    On the nodes after the first only the command runs: all share the local cache.
    """
    if node_rank(command) != 0:
        return run_command(command, dict(os.environ))
    try:
        place = Place(url)
        _pull(place, cache)
    except BackendError as error:  # what is there is compiled anew
        print_text(f"llamax: {error}; compiling without it", sys.stderr)
    before, start = modules(cache), time.monotonic()
    code = run_command(command, dict(os.environ))
    seconds, after = time.monotonic() - start, modules(cache)
    if code:
        print_text(f"llamax: nothing is sent to {url}: the command failed", sys.stderr)
        return code
    place = Place(url)
    code = _push(place, cache)
    compiler = compiler_folder(installed("neuronx-cc"))
    if compiler is not None and len(after) > len(before):
        write_time(place, compiler, CompileTime(seconds, len(after) - len(before)))
    return code


def node_rank(command: Sequence[str]) -> int:
    """The number of this node in a command of torchrun; 0 without one."""
    for option, value in pairwise(command):
        if option in ("--node-rank", "--node_rank") and value.isdecimal():
            return int(value)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
