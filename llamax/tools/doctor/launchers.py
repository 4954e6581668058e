"""Whether a launcher takes a job file, and can be started on this machine.

What a launcher refuses of a job file is in ``llamax.launch.checks``, the same as for launching.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from llamax.launch import sagemaker_checks
from llamax.launch.checks import problems
from llamax.launch.jobfile import JobFile
from llamax.launch.render import PHASES, environment
from llamax.tools.doctor.finding import Finding, passed, unknown

LAUNCHERS = [name for name, phases in PHASES.items() if "train" in phases]
PROGRAMS = {"torchrun": "torchrun", "mpirun": "mpirun", "slurm": "sbatch", "k8s": "kubectl"}


def accepting(job: JobFile) -> list[str]:
    """The launchers that would start the training of a job file."""
    return [launcher for launcher in LAUNCHERS if not problems(job, launcher, "train")]


def check(job: JobFile, launcher: str, environ: Mapping[str, str]) -> Iterator[Finding]:
    """The finding about the job's launcher, or, where none is given, about all of them."""
    if not launcher:
        yield _any(job)
    elif launcher == "sagemaker":
        wrong, _, remedy = sagemaker_checks.sdk_problem(job).partition("; ")
        if wrong:
            yield unknown("launcher", wrong, f"run doctor where the job is started, or {remedy}")
        else:
            yield passed("launcher", "the SageMaker SDK is installed")
    else:
        yield _program(job, launcher, environ)


def _any(job: JobFile) -> Finding:
    found = accepting(job)
    if not found:
        what = "no launcher takes the job file as it is"
        return Finding("error", "launcher", what, fix="llamax doctor --on LAUNCHER says why not")
    rest = " (--on LAUNCHER says why others do not)" if found != LAUNCHERS else ""
    return passed("launcher", f"the job file suits {', '.join(found)}{rest}")


def _program(job: JobFile, launcher: str, environ: Mapping[str, str]) -> Finding:
    """Whether the program of a launcher is here, in the job's environment or in the PATH."""
    program, path = PROGRAMS[launcher], environment(job, launcher, environ)["PATH"]
    if job.venv:
        path = f"{Path(job.folder, job.venv, 'bin')}{os.pathsep}{path}"
    found = shutil.which(program, path=path)
    if found is None:
        where = "run doctor where the job is started, or install it"
        return unknown("launcher", f"{program} is not installed here", where)
    return passed("launcher", f"{program} is {found}")
