"""``llamax audit --config llama2-7b --nodes 4``: the programs that a cluster would compile.

Traces the run without devices and without weights, one rank after the other in one process: every
kind of step on rank 0, each program on the ranks at the corners of the mesh, and, with few layers,
each program on every rank that could differ from those before it, by what these used of their
places in the mesh (on all ranks, with all layers: ``--ranks deep``).  On Trainium a program that
only one rank has costs 25 to 40 minutes of compilation while all others wait; here it costs a line
that says where it comes from.

The exit code is 0 only if the whole cluster would compile each program once and has the memory for
it, 7 if it would not compile each once, and 6 if it only lacks the memory.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llamax.cli.options import Parser, batch_length, command, folded
from llamax.cli.plan import DOES_NOT_FIT
from llamax.config.choices import AUDIT_RANKS
from llamax.runtime.errors import ConfigError
from llamax.runtime.json_writer import to_json
from llamax.runtime.logging import setup_logging
from llamax.runtime.process import run_main
from llamax.runtime.text import print_text


def parser() -> Parser:
    """The command line."""
    p = Parser(
        prog="llamax audit",
        usage="%(prog)s --config NAME_OR_PATH [--nodes N] [--instance NAME]\n"
        "                    [--ranks all|corners|deep] [--json]\n"
        "                    [--generate BATCHxLENGTH [--greedy]]\n"
        "                    [--section.key=value ...]",
        description="Trace a run without devices. Exit code 0 if the whole cluster would compile "
        "each program once, 7 if not, 6 if a program does not fit into memory.",
        allow_abbrev=False,
    )
    p.add_argument("--config", required=True, help="a recipe's name or a TOML file")
    p.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default 1)")
    p.add_argument("--instance", default="trn1.32xlarge", help="machine (default %(default)s)")
    p.add_argument(
        "--ranks",
        choices=AUDIT_RANKS,
        default="all",
        help="beside those at the corners of the mesh trace, with few layers, every rank that "
        "could differ (default) or none, or every rank with all layers: seconds a rank",
    )
    p.add_argument(
        "--generate",
        type=batch_length,
        metavar="BATCHxLENGTH",
        help="the programs of llamax generate --backend xla instead, for parallel.tensor ranks",
    )
    p.add_argument(
        "--greedy", action="store_true", help="with --generate: always the most likely token"
    )
    p.add_argument("--json", action="store_true", help="print the numbers as JSON")
    return p


@command
def main(argv: Sequence[str]) -> int:
    """Print the report; 0 if it passes, ``DIFFERS`` or ``DOES_NOT_FIT`` if not."""
    options, overrides = parser().parse_known_args(list(argv))
    setup_logging()

    from llamax.tools.audit.auditor import DIFFERS, audit
    from llamax.tools.audit.report import as_json, show

    if options.generate is None and options.greedy:
        raise ConfigError("--greedy is of --generate alone; leave it out")
    if options.generate is None:
        report = audit(
            options.config, options.instance, options.nodes, options.ranks, overrides=overrides
        )
    else:
        from llamax.tools.audit.generation import audit_generation

        batch, length = options.generate
        report = audit_generation(
            options.config,
            batch,
            length,
            options.instance,
            options.greedy,
            overrides=overrides,
        )
    if options.json:
        print_text(to_json(as_json(report)))
    else:
        print_text("\n".join(folded(show(report))))
    sys.stdout.flush()
    if report.passes:
        if not options.json:
            print_text("each program compiles once for the whole cluster")
        return 0
    for problem in filter(None, [*report.problems, report.does_not_fit]):
        print_text(f"llamax: {problem}", sys.stderr)
    return DIFFERS if report.problems else DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(run_main(main))
