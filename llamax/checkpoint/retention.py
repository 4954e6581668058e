"""Publishing, renaming and deleting checkpoint folders, so that a crash never leaves half of one.

::

    step-00000100.tmp     a save in progress                        removed at the next start
    step-00000100         published; complete once it holds ``done``
    step-00000100.old     the previous checkpoint of this step      restored or removed
    step-00000100.past    later than the step a run went back to    kept until removed by hand
                          (a second one of this step: .past-2)

A step folder may be a link to another disk.  Deleting removes the link and nothing in its target.
"""

from __future__ import annotations

import os
import shutil
from itertools import chain, count
from pathlib import Path

from llamax.checkpoint import manifest
from llamax.checkpoint.atomic import explain_write_errors
from llamax.checkpoint.hf_beside import HUB_PART
from llamax.runtime.files import sync_folder
from llamax.runtime.logging import logger


def publish(folder: Path, final: Path) -> None:
    """Rename a complete folder to ``final`` and write ``done``; replace what ``final`` was before.

    Raises CheckpointError or NoRoom if the disk refuses; the previous checkpoint is then restored.
    """
    old = final.with_name(final.name + ".old")
    with explain_write_errors(final, 0):
        if os.path.lexists(final):
            os.rename(final, old)
        try:
            os.rename(folder, final)
            sync_folder(final.parent)
            manifest.write_done(final)
        except BaseException:
            restore_previous(old, final)
            raise
        delete_or_warn(old)


def restore_previous(old: Path, final: Path) -> None:
    """Undo an unfinished ``publish``: remove ``final`` and rename ``old`` back to it."""
    if os.path.lexists(final):
        delete_checkpoint(final)
    if os.path.lexists(old):
        os.rename(old, final)


def move_to_past(folder: Path) -> None:
    """Rename a checkpoint later than the step that a run went back to; no run resumes from it.

    Earlier ones of the same step keep their names: the next is ``.past-2``.
    """
    names = chain([".past"], (f".past-{number}" for number in count(2)))
    past = next(p for n in names if not os.path.lexists(p := folder.with_name(folder.name + n)))
    try:
        os.rename(folder, past)
    except OSError as error:
        logger.warning("cannot rename %s: %s; remove it", folder, error.strerror)
        return
    logger.info("%s is later than the checkpoint just saved; renamed to %s", folder, past)


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, ``done`` first, so that a half-deleted one never counts as complete.

    If ``folder`` is a link, only the link is deleted.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    (folder / manifest.DONE).unlink(missing_ok=True)
    sync_folder(folder)
    shutil.rmtree(folder)


def delete_or_warn(folder: Path) -> None:
    """Delete a checkpoint if it exists; if the file system refuses, the next start removes it."""
    try:
        if os.path.lexists(folder):
            delete_checkpoint(folder)
    except OSError as error:
        logger.warning("cannot remove all of %s: %s", folder, error.strerror)


def clean_up(folder: Path) -> None:
    """Remove what interrupted saves and deletions left in ``folder``; finish a replacement."""
    for path in sorted(folder.glob("step-*")):
        name = path.name.removesuffix(".tmp").removesuffix(".old")
        if not path.is_dir() or not manifest.STEP_FOLDER.fullmatch(name):
            continue
        final = folder / name
        if path.name.endswith(".old") and not (final / manifest.DONE).exists():
            delete_or_warn(final)
            if (path / manifest.DONE).exists():
                os.rename(path, final)
        elif path.name != name or not (path / manifest.DONE).exists():
            delete_checkpoint(path)
        elif not path.is_symlink():
            part = path / HUB_PART
            if part.is_dir() and not part.is_symlink():
                shutil.rmtree(part)
