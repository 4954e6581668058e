"""Checks of a run folder before anything is written there: nothing of the user is lost."""

from __future__ import annotations

import os
import re
from pathlib import Path

from llamax.config.constants import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    LOCK_FILE,
    METRICS_FILE,
)
from llamax.config.step_folders import STEP_FOLDER
from llamax.runtime.errors import ConfigError, LinkError
from llamax.runtime.files import read_file, refuse_foreign_link
from llamax.runtime.json_reader import parse_object

REPLACED = (CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, LOCK_FILE)
OF_OTHERS = {"config.json": "model", "dataset.json": "dataset"}  # a file of each kind of folder
FIELDS = {"step", "consumed_tokens", "tokens_per_s"}  # of every record
OWNER = re.compile(rb"(pid \d+ on .* since .*\n)?")


def check_run_folder(folder: Path) -> None:
    """Raise if a run folder is something else's, or another user links checkpoints.

    A link of one's own, such as to a larger disk, is followed.  Raises ConfigError and LinkError.
    """
    _check_place(folder)
    # The look at the run comes last: another rank may begin it in between, with its lock.
    if (why := _of_something_else(folder)) and not is_run(folder):
        raise ConfigError(f"run.folder={folder} {why}")
    refuse_foreign_link(folder / CHECKPOINTS_FOLDER)


def _of_something_else(folder: Path) -> str:
    """Why a folder that is not a run's is refused, and what to do; empty if it is not."""
    for name in REPLACED:
        if (path := folder / name).is_file() and path.stat().st_size:
            return (
                f"holds a {name} that is not of a run and would be replaced; set run.folder to "
                "another folder"
            )
    for name, kind in OF_OTHERS.items():
        if (folder / name).is_file():
            return (
                f"is the folder of a {kind}; set run.folder to another folder, {folder / 'run'} "
                "for example"
            )
    return ""


def _check_place(folder: Path) -> None:
    """Raise ConfigError where a file, or a link to nothing, stands in the way of a run folder."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if there.is_dir():
        return
    what = "a file"
    if there.is_symlink():
        what = f"a link to {os.readlink(there)}, which is not there (is its storage mounted?)"
    raise ConfigError(
        f"run.folder={folder} cannot be made: {there} is {what}; set run.folder to another folder"
    )


def is_run(folder: Path) -> bool:
    """Whether a run has begun in a folder: by its lock, which comes first, or what it has written.

    A copy may lack the lock.
    """
    lock, metrics, saved = (folder / n for n in (LOCK_FILE, METRICS_FILE, CHECKPOINTS_FOLDER))
    try:
        if lock.exists():
            return OWNER.fullmatch(read_file(lock)) is not None
        if metrics.exists():
            return parse_object(read_file(metrics).partition(b"\n")[0], False).keys() >= FIELDS
        return any(STEP_FOLDER.fullmatch(path.name) for path in saved.iterdir())
    except (OSError, LinkError, ValueError):
        return False
