"""The folders of checkpoints: their names, and which of them are complete.

What they hold: ``llamax.checkpoint.manifest``.
"""

from __future__ import annotations

import re
from pathlib import Path

from llamax.config.constants import CHECKPOINTS_FOLDER

STEP_FOLDER = re.compile(r"step-(\d{8}|[1-9]\d{8,})", re.ASCII)
MANIFEST, DONE = "manifest.json", "done"  # files in a checkpoint; without ``done`` it is none yet


def step_name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(folder.name.removeprefix("step-"))


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, complete or not, rather than a run with checkpoints."""
    return (folder / MANIFEST).exists() or STEP_FOLDER.match(folder.name) is not None


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first.

    ``folder`` is the run's folder or its ``checkpoints``.
    """
    inner = folder / CHECKPOINTS_FOLDER
    folder = inner if inner.is_dir() else folder
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)]
    return sorted((path for path in found if (path / DONE).is_file()), key=step_of)
