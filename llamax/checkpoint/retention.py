"""The names of checkpoint folders: given, taken back, set aside, deleted, swept.

::

    step-00000100.tmp     a save that has not ended               swept at the next start
    step-00000100         committed, once it holds ``done``
    step-00000100.old     what bore the name until then           put back, or swept
    step-00000100.past    what the run has gone back behind       stays until removed by hand
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from llamax.checkpoint import manifest as files
from llamax.checkpoint.hf_beside import PART
from llamax.checkpoint.safetensors_io import writing
from llamax.runtime.files import sync_folder
from llamax.runtime.logging import logger


def place(folder: Path, final: Path) -> None:
    """Give a committed folder its name, then ``done``; what bore the name before goes last."""
    old = final.with_name(final.name + ".old")
    with writing(final, 0):
        if os.path.lexists(final):
            os.rename(final, old)
        try:
            os.rename(folder, final)
            sync_folder(final.parent)
            files.finish(final)
        except BaseException:
            undo(old, final)
            raise
        discard(old)


def undo(old: Path, final: Path) -> None:
    """Take a replacement back that did not come to its end."""
    if os.path.lexists(final):
        files.delete(final)
    if os.path.lexists(old):
        os.rename(old, final)


def set_aside(folder: Path) -> None:
    """Rename a checkpoint that the run went back behind, so that no resume takes it by itself."""
    aside = folder.with_name(folder.name + ".past")
    discard(aside)
    try:
        os.rename(folder, aside)
    except OSError as error:
        logger.warning("cannot rename %s: %s; remove it", folder, error.strerror)
        return
    logger.info("%s is later than what was saved now: it is %s from here on", folder, aside)


def discard(folder: Path) -> None:
    """Delete a checkpoint; where the file system will not, the next start sweeps what is left."""
    try:
        if os.path.lexists(folder):
            files.delete(folder)
    except OSError as error:
        logger.warning("cannot remove all of %s: %s", folder, error.strerror)


def sweep(folder: Path) -> None:
    """Remove what an interrupted save or deletion left behind, and finish a replacement."""
    for path in sorted(folder.glob("step-*")):
        name = path.name.removesuffix(".tmp").removesuffix(".old")
        if not path.is_dir() or not files.STEP.fullmatch(name):
            continue
        final = folder / name
        if path.name.endswith(".old") and not (final / files.DONE).exists():
            shutil.rmtree(final, ignore_errors=True)
            if (path / files.DONE).exists():
                os.rename(path, final)
        elif path.name != name or not (path / files.DONE).exists():
            files.delete(path)
        elif (path / PART).exists():
            shutil.rmtree(path / PART)
