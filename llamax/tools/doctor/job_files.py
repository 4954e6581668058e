"""The environment and the secrets that a job takes from the files of a node."""

from __future__ import annotations

import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from llamax.launch.jobfile import JobFile
from llamax.runtime.text import in_shell
from llamax.tools.doctor.finding import Finding, passed, unknown

OTHERS = stat.S_IRWXG | stat.S_IRWXO


def environment(job: JobFile, prefix: str = sys.prefix) -> Iterator[Finding]:
    """The virtual environment of the job; ``prefix``: the one whose packages doctor has seen."""
    if not job.venv:
        return
    folder = Path(job.folder, job.venv)
    if (folder / "bin").is_dir():
        if folder.resolve() == Path(prefix).resolve():
            yield passed("venv", f"{folder}, which runs doctor")
        else:
            yield unknown(
                "venv",
                f"the packages above are those of {prefix}, and the job runs in {folder}",
                f"{in_shell(folder / 'bin' / 'python3')} -m llamax doctor",
            )
    elif Path(job.folder).is_dir():
        yield Finding(
            "error",
            "venv",
            f"there is no folder {folder / 'bin'}",
            "the programs of the job are in it",
            "give the whole path of venv in the job file",
        )
    else:
        yield unknown("venv", f"{folder} is not here", "run doctor on a node")


def secrets(job: JobFile) -> Iterator[Finding]:
    """The files of the table secrets: whether this user alone can read them."""
    for name, path in job.secrets:
        try:
            with open(path, "rb") as file:
                content = file.read(1)
            mode = Path(path).stat().st_mode
        except OSError as error:
            what = f"{path} cannot be read here ({error.strerror})"
            yield unknown("secrets", f"secrets.{name}: {what}", "run doctor where the job starts")
            continue
        if not content:
            yield Finding(
                "error",
                "secrets",
                f"secrets.{name}: {path} is empty",
                "the variable would have no value",
                "write the value into the file",
            )
        elif mode & OTHERS:
            yield Finding(
                "warning",
                "secrets",
                f"secrets.{name}: {path} is open to other users",
                "whoever can read the file has the secret",
                f"chmod 600 {in_shell(path)}",
            )
        else:
            yield passed("secrets", f"secrets.{name} in {path}")
