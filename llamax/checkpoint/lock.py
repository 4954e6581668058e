"""One run, one folder: who writes into a folder holds the lock in it, and the lock says who.

The lock is the kernel's (``flock`` on the file ``lock``), so it ends with the process that holds
it, however that ends: there are no stale locks to remove.  The file's text names the owner.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llamax.runtime.errors import CheckpointError
from llamax.runtime.logging import logger

LOCK = "lock"
PATIENCE_S = 5.0  # a killed owner may take a moment to be gone


@contextmanager
def held(folder: Path, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Own ``folder`` meanwhile.

    Raises CheckpointError that names the owner where another process has it.
    """
    path = folder / LOCK
    if os.path.lexists(folder) and not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; remove it or choose another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from None
    try:
        if _lock(file, folder, patience_s):
            about = f"pid {os.getpid()} on {socket.gethostname()} since {time.ctime()}\n"
            os.ftruncate(file, 0)
            os.pwrite(file, about.encode(), 0)
        yield
    finally:
        os.close(file)


def _lock(file: int, folder: Path, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
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
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            logger.warning(
                "%s: the file system cannot lock files (%s); make sure that no other run writes "
                "there",
                folder,
                error.strerror,
            )
            return False
