"""``llamax launch``: one job file, on torchrun, mpirun, Slurm, docker, Kubernetes or SageMaker.

::

    job.toml ──> checks ──> a script or a manifest ──> --render: printed; else run

Phases come in the order of a project: cluster, image, shell, prepare, precompile, train,
tensorboard, serve.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from llamax.cli.options import Parser
from llamax.launch import jobfile, sagemaker_checks
from llamax.launch.checks import problems
from llamax.launch.cluster import actions as cluster_actions
from llamax.launch.environment import literal_values, plain_text_secrets, sdk_notes
from llamax.launch.jobfile import JobFile
from llamax.launch.render import ACTIONS, PHASES, action, environment, needed, render, starter
from llamax.runtime.errors import (
    BackendError,
    ConfigError,
    Interrupted,
    did_you_mean,
    join_or,
    refuse,
)
from llamax.runtime.process import wait_for_end

EACH_NODE = ("precompile", "train")  # phases
FORWARDED = (signal.SIGTERM, signal.SIGHUP)
OTHER_NAMES = {"kubernetes": "k8s", "kubectl": "k8s", "eks": "k8s", "sbatch": "slurm"}
MISSING = "{} is not installed here; install it, or print what would be run with --render"
EPILOG = "Keys of a job file, a [section] for what is before the dot:\n\n"


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    launcher, phase, what = options.on, options.phase, options.action
    known_name("--on", launcher, PHASES)
    having = [name for name, phases in PHASES.items() if phase in phases]
    if having and launcher not in having:
        raise ConfigError(
            f"--phase {phase}: --on {launcher} has {', '.join(PHASES[launcher])}; use one of "
            f"these, or --on {join_or(having)}"
        )
    known_name("--phase", phase, PHASES[launcher])
    known_name("--action", what, ACTIONS)
    if what != "start" and (phase == "image" or (phase == "tensorboard" and launcher != "k8s")):
        raise ConfigError(f"--action {what}: --phase {phase} runs in the foreground; press Ctrl-C")
    if phase == "cluster" and what not in cluster_actions(launcher):
        raise ConfigError(
            f"--action {what}: --phase cluster has {join_or(list(cluster_actions(launcher)))}"
        )
    if options.node is not None and not _on_each_node(launcher, phase, what):
        raise ConfigError(
            f"--node={options.node} is for starting {join_or(EACH_NODE)} with --on torchrun, whose "
            "nodes each run their own command; leave it out"
        )
    job = jobfile.load(options.job)
    if options.node is not None and not 0 <= options.node < job.nodes:
        most = f"0 to {job.nodes - 1}" if job.nodes > 1 else "0, the only node of the job"
        raise ConfigError(f"--node={options.node} is out of range; use {most}")
    refuse(problems(job, launcher, phase), str(options.job))
    for name in plain_text_secrets(job) if what == "start" else ():
        print(
            f"llamax: environment.{name} is stored in plain text with the job; if it is a secret, "
            "use the table secrets",
            file=sys.stderr,
        )
    for line in (*literal_values(job), *sdk_notes(job)) if what == "start" else ():
        print(f"llamax: {line}", file=sys.stderr)
    text = render(job, launcher, phase) if what == "start" else action(job, launcher, phase, what)
    if options.render:
        print(text, end="")
        return 0
    return _run(job, launcher, phase, what, text, options.node)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="llamax launch",
        description="Start a job, show its state or stop it, on any launcher; the job file\n"
        "describes it.",
        epilog=EPILOG + jobfile.help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--job", type=Path, required=True, help="the job file")
    parser.add_argument("--on", required=True, metavar="LAUNCHER", help=", ".join(PHASES))
    parser.add_argument(
        "--phase",
        default="train",
        help="cluster, image, shell, prepare, precompile, train, tensorboard or serve (train)",
    )
    parser.add_argument("--action", default="start", help=f"{', '.join(ACTIONS)} (start)")
    parser.add_argument(
        "--node", type=int, metavar="N", help="torchrun: number of this node, 0 on the master"
    )
    parser.add_argument(
        "--render", action="store_true", help="print what would be run, without running it"
    )
    return parser.parse_args(list(argv))


def _on_each_node(launcher: str, phase: str, what: str) -> bool:
    """Whether the nodes of a job each run the command; the other phases run on one of them."""
    return launcher == "torchrun" and phase in EACH_NODE and what == "start"


def known_name(option: str, value: str, values: Sequence[str] | dict[str, tuple[str, ...]]) -> None:
    """Raise ConfigError if the value of an option is none of ``values``."""
    if value not in values:
        near = OTHER_NAMES.get(value.lower(), value)
        raise ConfigError(f"{option} {value}: unknown here{did_you_mean(near, values)}")


def _run(job: JobFile, launcher: str, phase: str, what: str, text: str, node: int | None) -> int:
    """Run a rendered text in this terminal; its exit code."""
    if _on_each_node(launcher, phase, what) and job.nodes > 1 and node is None:
        others = f"others 1 to {job.nodes - 1}" if job.nodes > 2 else "other 1"
        raise ConfigError(
            f"--node is missing: {job.nodes} nodes each run this command with their own, 0 on "
            f"{job.torchrun.master}, the {others}"
        )
    by_sdk = launcher == "sagemaker" and phase != "image" and what == "start"
    if by_sdk and (wrong := sagemaker_checks.sdk_problem(job)):
        raise BackendError(f"{wrong}, or print what it would run with --render")
    environ = environment(job, launcher, os.environ)
    program = "" if what == "start" else needed(launcher, phase, what)
    if program and not shutil.which(program, path=environ["PATH"]):
        raise BackendError(MISSING.format(program))
    with tempfile.NamedTemporaryFile("w", suffix=f"-{job.name}-{phase}") as file:
        file.write(text)
        file.flush()
        command = (
            starter(job, launcher, phase, file.name) if what == "start" else ["bash", file.name]
        )
        command += [] if node is None else [str(node)]
        if what == "start":
            print(f"$ {' '.join(map(quote, command))}", file=sys.stderr)
        try:
            return run_command(command, environ)
        except FileNotFoundError:
            raise BackendError(MISSING.format(command[0])) from None


def run_command(command: Sequence[str], environ: dict[str, str]) -> int:
    """Run a command and return its exit code; signals are left to it, so that ranks can save.

    The terminal sends SIGINT to the command too; a command that it ends has the code 130.
    """
    child: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: object) -> None:
        if child:
            child[0].send_signal(number)

    interrupts: list[int] = []
    previous = [signal.signal(number, forward) for number in FORWARDED]
    previous.append(signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number)))
    try:
        child.append(subprocess.Popen(command, env=environ))
        code = wait_for_end(child[0].poll)
    finally:
        for number, handler in zip((*FORWARDED, signal.SIGINT), previous, strict=True):
            signal.signal(number, handler)
    if code and interrupts:
        return Interrupted.exit_code
    return code if code >= 0 else 128 - code
