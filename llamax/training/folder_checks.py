"""Checks of a run folder before anything is written there: nothing of the user is lost."""

from __future__ import annotations

from pathlib import Path

from llamax.config.constants import CHECKPOINTS_FOLDER, CONFIG_FILE, LOCK_FILE, METRICS_FILE
from llamax.runtime.errors import ConfigError
from llamax.runtime.files import refuse_foreign_link

SIGNS = (LOCK_FILE, METRICS_FILE, CHECKPOINTS_FOLDER)  # of an earlier start; the lock comes first


def check_run_folder(folder: Path) -> None:
    """Raise if ``config.toml`` in a run folder is not of a run, or another user links checkpoints.

    A link of one's own, such as to a larger disk, is followed.  Raises ConfigError and LinkError.
    """
    config = folder / CONFIG_FILE
    if config.exists() and not any((folder / name).exists() for name in SIGNS):
        raise ConfigError(
            f"run.folder={folder} holds a {CONFIG_FILE} that is not of a run and would be "
            "replaced; set run.folder to another folder"
        )
    refuse_foreign_link(folder / CHECKPOINTS_FOLDER)
