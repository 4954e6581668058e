"""Publishing, renaming and deleting checkpoint folders, so that a crash never leaves half of one.

::

    step-00000100.tmp     a save in progress                        removed at the next start
    step-00000100         published; complete once it holds ``done``
    step-00000100.old     the previous checkpoint of this step      restored or removed
    step-00000100.past    later than the step a run went back to    kept until removed by hand
                          (a second one of this step: .past-2)

A step folder may be a link to another disk.  Deleting removes the link and nothing in its target.
What an interrupted save left is deleted only if all in it has the names of a checkpoint's files.
"""

from __future__ import annotations

import os
import re
import shutil
from itertools import chain, count
from pathlib import Path

from llamax.checkpoint import manifest
from llamax.checkpoint.atomic import explain_write_errors
from llamax.checkpoint.hf_beside import HUB, HUB_PART
from llamax.checkpoint.manifest_index import INDEX
from llamax.config.step_folders import DONE, MANIFEST, STEP_FOLDER
from llamax.runtime.files import sync_folder
from llamax.runtime.logging import logger
from llamax.runtime.text import printable_line

# Names in the folder of a checkpoint, complete or not; .nfs: a deleted file that is still open.
OWN = re.compile(
    rf"\.?(done|{re.escape(MANIFEST)}|{re.escape(INDEX)}|{re.escape(manifest.CONFIG_TOML)}"
    rf"|(rank|failed)-[\w-]+\.json|{manifest.RANK_FILE.pattern})(\.part|\.partial)?"
    rf"|{HUB}|{re.escape(HUB_PART)}|\.nfs\w+"
)


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
        if os.path.lexists(old):
            sweep(old)


def restore_previous(old: Path, final: Path) -> None:
    """Undo an unfinished ``publish``: remove ``final`` and rename ``old`` back to it."""
    if os.path.lexists(final):
        delete_checkpoint(final)
    if os.path.lexists(old):
        os.rename(old, final)


def move_to_past(folder: Path) -> None:
    """Rename a checkpoint later than the step that a run went back to; no run resumes from it."""
    try:
        past = _rename_to_past(folder)
    except OSError as error:
        logger.warning("cannot rename %s: %s; remove it", folder, error.strerror)
        return
    logger.info("%s is later than the checkpoint just saved; renamed to %s", folder, past)


def _rename_to_past(folder: Path) -> Path:
    """Rename a folder to ``.past``, or to ``.past-2`` where that exists; the new path."""
    names = chain([".past"], (f".past-{number}" for number in count(2)))
    past = next(p for n in names if not os.path.lexists(p := folder.with_name(folder.name + n)))
    os.rename(folder, past)
    return past


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, ``done`` first, so that a half-deleted one never counts as complete.

    If ``folder`` is a link, only the link is deleted.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    (folder / DONE).unlink(missing_ok=True)
    sync_folder(folder)
    shutil.rmtree(folder)


def delete_or_warn(folder: Path) -> None:
    """Delete a checkpoint if it exists; if the file system refuses, the next start removes it."""
    try:
        if os.path.lexists(folder):
            delete_checkpoint(folder)
    except OSError as error:
        logger.warning("cannot remove all of %s: %s", folder, error.strerror)


def sweep(folder: Path) -> None:
    """Delete what an interrupted save or deletion left; rename what llamax did not make."""
    try:
        names = [] if folder.is_symlink() else sorted(os.listdir(folder))
        if other := next((name for name in names if not OWN.fullmatch(name)), None):
            logger.warning(
                "%s is not a checkpoint of llamax: it holds %s; renamed to %s",
                folder,
                printable_line(other, 80),
                _rename_to_past(folder).name,
            )
            return
    except OSError as error:
        logger.warning("cannot remove %s: %s", folder, error.strerror)
        return
    delete_or_warn(folder)


def clean_up(folder: Path) -> None:
    """Remove what interrupted saves and deletions left in ``folder``; finish a replacement."""
    for path in sorted(folder.glob("step-*")):
        name = path.name.removesuffix(".tmp").removesuffix(".old")
        if not path.is_dir() or not STEP_FOLDER.fullmatch(name):
            continue
        final = folder / name
        if path.name.endswith(".old") and not (final / DONE).exists():
            if os.path.lexists(final):
                sweep(final)
            if (path / DONE).exists():
                os.rename(path, final)
            else:
                sweep(path)
        elif path.name != name or not (path / DONE).exists():
            sweep(path)
        elif not path.is_symlink():
            part = path / HUB_PART
            if part.is_dir() and not part.is_symlink():
                shutil.rmtree(part)
