"""``llamax doctor [--job job.toml [--on LAUNCHER]]``: checks of this machine, and of a job on it.

::

    ok       torch        torch 2.9.0
    WARNING  ports        port 29500 lies in 1024-60999, which the kernel assigns to connections
             why          an outgoing connection may use it when the ranks rendezvous there
             fix          sudo sysctl -w net.ipv4.ip_local_reserved_ports=29500
    unknown  devices      no Neuron device here; the job needs 16 on each node
             see          run doctor on a node

Without a job only the machine is checked.  The exit code is 8 if there is an error, else 0.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from llamax.cli.launch import known_name
from llamax.cli.options import Parser, folded
from llamax.runtime.errors import ConfigError, refuse
from llamax.runtime.json_writer import to_json
from llamax.runtime.process import run_main
from llamax.runtime.text import print_text
from llamax.runtime.units import count
from llamax.tools.doctor import Finding, Host, launchers
from llamax.tools.doctor.finding import Level

NOT_READY = 8
COLUMNS = r".{8} .{13} "  # level and name, before the text


def show(finding: Finding) -> Iterator[str]:
    """A finding as lines of text."""
    label = {"warning": "WARNING", "error": "ERROR"}.get(finding.level, finding.level)
    yield f"{label:<8} {finding.name:<13} {finding.what}"
    if finding.why:
        yield f"{'':<8} {'why':<13} {finding.why}"
    if finding.fix:
        yield f"{'':<8} {'see' if finding.level == 'unknown' else 'fix':<13} {finding.fix}"


def as_json(findings: Sequence[Finding]) -> dict[str, object]:
    """The findings for programs; ``ready``: no error is among them."""
    counts = Counter(finding.level for finding in findings)
    return {
        "ready": not counts["error"],
        "counts": {level: counts[level] for level in get_args(Level)},
        "findings": [asdict(finding) for finding in findings],
    }


def main(argv: Sequence[str]) -> int:
    """Print the findings; 0 if there is no error, ``NOT_READY`` if there is one."""
    parser = Parser(
        prog="llamax doctor",
        description="Check this machine, and a job on it, before it is launched. Exit code 8 if "
        "there is an error.",
        allow_abbrev=False,
    )
    parser.add_argument("--job", type=Path, help="the job file")
    parser.add_argument(
        "--on", default="", metavar="LAUNCHER", help="what will start the job, as of llamax launch"
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=0.0,
        metavar="S",
        help="seconds to wait for the other nodes (0)",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    options = parser.parse_args(list(argv))

    from llamax.launch import jobfile
    from llamax.launch.checks import problems
    from llamax.launch.environment import variables
    from llamax.tools.doctor.doctor import examine

    launcher = options.on
    if launcher:
        known_name("--on", launcher, launchers.LAUNCHERS)
        if options.job is None:
            raise ConfigError(f"--on {launcher} needs a job file; add --job job.toml")
    job = None
    if options.job:
        job = jobfile.load(options.job)
        wrong = problems(job, launcher, "train")
        if wrong and not launcher and launchers.accepting(job) == ["sagemaker"]:
            launcher, wrong = "sagemaker", []
        refuse(wrong, str(options.job))
    counts = Counter[str]()
    sets = {each.name: each.value for each in variables(job)} if job else {}
    findings = []
    host = Host(environ={**os.environ, **sets})
    for finding in examine(host, job, options.wait, launcher):
        counts[finding.level] += 1
        findings.append(finding)
        if not options.json:
            *lines, last = show(finding)
            lines = [*folded(lines, COLUMNS)]
            lines += [last] if finding.fix else folded([last], COLUMNS)  # a command stays whole
            print_text("\n".join(lines))
    if options.json:
        print_text(to_json(as_json(findings)))
        return NOT_READY if counts["error"] else 0
    print_text(
        f"\n{counts['ok']} fine, {counts['unknown']} unknown, "
        f"{count(counts['warning'], 'warning')}, {count(counts['error'], 'error')}"
    )
    return NOT_READY if counts["error"] else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
