"""A lock on a folder: one process at a time writes into it.

It is the kernel's lock (``flock`` on the file ``lock``), which ends with the process that holds it,
even when that is killed: there are no stale locks to remove.  The file's text names the owner.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llamax.config.constants import LOCK_FILE
from llamax.runtime.errors import CheckpointError, LinkError, NoRoom
from llamax.runtime.files import NO_ROOM, same_file
from llamax.runtime.logging import logger

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system
TIMEOUT_S = 5.0  # a killed owner may take a moment to end


@contextmanager
def lock_folder(folder: Path, timeout_s: float = TIMEOUT_S) -> Iterator[None]:
    """Hold the lock of ``folder``, which is created if needed; wait up to ``timeout_s`` for it.

    Raises CheckpointError that names the owner if another process holds it.  On a file system
    without locks it only logs a warning.
    """
    path = folder / LOCK_FILE
    if os.path.lexists(folder) and not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; remove it or choose another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = same_file(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from None
    try:
        if _acquire(file, folder, timeout_s):
            _write_owner(file, path)
        yield
    finally:
        os.close(file)


@contextmanager
def lock_abandoned(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder that a killed process of this user and machine left; yield whether.

    Raises CheckpointError that names the owner if a process holds the lock.
    """
    try:
        if folder.is_symlink():
            raise LinkError(f"{folder} is a link")
        file = same_file(folder / LOCK_FILE, os.O_RDWR)
    except (OSError, LinkError):
        yield False
        return
    try:
        owner = re.compile(rf"pid \d+ on {re.escape(socket.gethostname())} since .*\n")
        yield (
            folder.stat().st_uid == os.geteuid()
            and _acquire(file, folder, 0)
            and owner.fullmatch(os.pread(file, 200, 0).decode(errors="replace")) is not None
        )
    finally:
        os.close(file)


def _write_owner(file: int, path: Path) -> None:
    owner = f"pid {os.getpid()} on {socket.gethostname()} since {time.ctime()}\n"
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, owner.encode(), 0)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise CheckpointError(f"cannot write {path}: {error.strerror}") from None
        raise NoRoom(
            f"no room for {path} ({error.strerror}); make room or write elsewhere"
        ) from None


def _acquire(file: int, folder: Path, timeout_s: float) -> bool:
    """Whether the lock was acquired; False if the file system has no locks."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            owner = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
            raise CheckpointError(
                f"{folder} is in use by {owner}; wait for it, stop it, or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise CheckpointError(
                    f"cannot lock {folder / LOCK_FILE}: {error.strerror}"
                ) from None
            logger.warning(
                "%s: the file system cannot lock files (%s); make sure that no other run writes "
                "there",
                folder,
                error.strerror,
            )
            return False
