"""Files and folders that appear complete or not at all, with disk errors as one line.

::

    with new_folder(out) as part:       OUT.part, locked by this process
        ...                             filled; removed again after an error or SIGTERM
                                        -> renamed to OUT

``write_durable`` replaces a small file and syncs it to disk; ``write_note`` only shows a small file
to other ranks at once.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llamax.checkpoint.lock import lock_folder
from llamax.config.constants import LOCK_FILE
from llamax.runtime.errors import CheckpointError, NoRoom, Terminated
from llamax.runtime.files import NO_ROOM, write_atomic


@contextmanager
def explain_write_errors(path: Path, needed_bytes: int) -> Iterator[None]:
    """Raise an OSError from writing ``path`` as CheckpointError.

    A full disk, a quota or a file size limit becomes NoRoom, with the bytes needed and free.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise CheckpointError(f"cannot write {path}: {error.strerror}") from None
        free = shutil.disk_usage(path.parent).free
        raise NoRoom(
            f"no room for {path} ({error.strerror}): {needed_bytes} bytes needed, {free} free; "
            "make room or write elsewhere"
        ) from None


def write_note(path: Path, text: str) -> None:
    """Show a small file to other ranks, complete but not yet durable.

    A rank that sees it may rename the folder at once, so nothing is synced afterwards.
    """
    with explain_write_errors(path, len(text)):
        partial = path.with_name(path.name + ".part")
        partial.write_text(text)
        os.replace(partial, path)


def write_durable(path: Path, text: str) -> None:
    """Replace a small text file on disk: after a crash it has the old text or the new one."""
    data = text.encode()
    with explain_write_errors(path, len(data)):
        write_atomic(path, data)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to fill; rename it to ``out`` at the end, or remove it after an error.

    Another process cannot fill the same folder meanwhile.  SIGTERM raises Terminated.
    Raises CheckpointError if ``out`` exists and is not an empty folder.
    """
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out} exists already; remove it or choose another `out`")
    out = out.resolve()  # a link to an empty folder stays a link
    part = out.with_name(out.name + ".part")
    with lock_folder(part, timeout_s=0), _terminable(out):
        try:
            with explain_write_errors(part, 0):
                for leftover in part.iterdir():
                    if leftover.is_dir():
                        shutil.rmtree(leftover)
                    elif leftover.name != LOCK_FILE:
                        leftover.unlink()
            yield part
            with explain_write_errors(out, 0):
                (part / LOCK_FILE).unlink()
                os.rename(part, out)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


@contextmanager
def _terminable(out: Path) -> Iterator[None]:
    """Raise Terminated on SIGTERM, if this is the main thread and the signal has no handler yet."""

    def terminate(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # removing the folder takes a moment
        raise Terminated(f"stopped by SIGTERM: {out} was not written")

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
