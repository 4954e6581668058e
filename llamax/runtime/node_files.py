"""Files that one process of a machine makes and the same user's other processes read.

::

    /tmp/llamax-1000/        a folder of this user alone; 1000 is the user's number
        NAME                 sha256 of what follows, then the content
        NAME.lock            locked by the process that makes the file; others wait for it

For what every rank of a machine would compute alike.  A file appears whole, by renaming, and each
reader compares its hash.  A folder or file of another user, or one that others may write to, is not
used; then, and where nothing can be written, each process makes a temporary file for itself.  Files
that were not used for a week are removed when one is made.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from llamax.runtime.errors import DataError, LinkError
from llamax.runtime.files import NO_ROOM, new_file, same_file
from llamax.runtime.mapping import map_file

START = 32  # bytes before the content
KEPT_S = 7 * 24 * 3600
WAIT_S = 600  # for a process that makes a file; it may have been stopped
Make = Callable[[IO[bytes]], object]


def shared_file(name: str, make: Make) -> mmap.mmap:
    """Map the file ``name`` of this machine; ``make`` writes its content if there is none.

    The content, from byte ``START`` on, must depend on nothing but the name.
    """
    try:
        path = Path(tempfile.gettempdir(), f"llamax-{os.geteuid()}", name)
        _check_own_folder(path.parent)
        if found := _map_whole(path):
            return found
        with _locked(path.with_name(f"{name}.lock")):
            return _map_whole(path) or _make_shared(path, make)
    except (OSError, LinkError):
        return private_file(make)


def private_file(make: Make) -> mmap.mmap:
    """Map a temporary file without a name, of the same layout.

    Raises DataError where there is no room or no folder for it.
    """
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:
        raise DataError(
            "no folder for temporary files can be written to; name one in the environment variable "
            "TMPDIR"
        ) from None
    try:
        with tempfile.TemporaryFile() as file:
            file.write(bytes(START))
            make(file)
            file.flush()
            return map_file(file.fileno(), Path(folder, "a temporary file"))
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise DataError(
            f"no room for a temporary file in {folder} ({error.strerror}); make "
            "room, or name another folder in the environment variable TMPDIR"
        ) from None


def _check_own_folder(folder: Path) -> None:
    """Create a folder, or raise OSError if it is not of this user alone."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise OSError(f"{folder} is not a folder of this user alone")


def _map_whole(path: Path) -> mmap.mmap | None:
    """Map a file if it is there, of this user, and has its hash."""
    try:
        with open(path, "rb", opener=same_file) as file:
            handle = file.fileno()
            if os.fstat(handle).st_uid != os.geteuid() or file.read(START) != _digest(file):
                return None
            os.utime(handle)
            return map_file(handle, path)
    except FileNotFoundError:
        return None


def _make_shared(path: Path, make: Make) -> mmap.mmap:
    _remove_old(path.parent)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "w+b", opener=new_file) as file:
            file.write(bytes(START))
            make(file)
            file.seek(START)
            digest = _digest(file)
            file.seek(0)
            file.write(digest)
            file.flush()
            os.replace(partial, path)
            return map_file(file.fileno(), path)
    finally:
        partial.unlink(missing_ok=True)


def _digest(file: IO[bytes]) -> bytes:
    """The hash of what follows in a file."""
    digest, buffer = sha256(), memoryview(bytearray(2**20))
    source: Any = file
    while size := source.readinto(buffer):
        digest.update(buffer[:size])
    return digest.digest()


def _remove_old(folder: Path) -> None:
    for path in folder.iterdir():
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > KEPT_S:
                path.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file; raise OSError if another process holds it for ``WAIT_S``."""
    handle, deadline = same_file(path, os.O_RDWR | os.O_CREAT), time.monotonic() + WAIT_S
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield
    finally:
        os.close(handle)
