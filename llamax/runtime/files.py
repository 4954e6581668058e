"""Writing and reading files without following links, atomic writes, free space, and checksums.

Run and output folders may be writable by others, so nothing in them is trusted: a link there could
lead a write to any file of the user.  ``new_file`` and ``same_file`` are openers::

    open(path, "wb", opener=new_file)     a new file; a stale regular file of this name is removed
    open(path, "ab", opener=same_file)    a file that may exist, to append, read or change

``read_input`` reads what a user names, which may be a pipe: ``--prompts-file <(sort prompts.txt)``.

Files and folders are created with the modes that the user's umask allows.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import select
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from io import RawIOBase
from pathlib import Path
from typing import TypeGuard

from llamax.runtime.address import refuse_address
from llamax.runtime.errors import DataError, LinkError
from llamax.runtime.warn import warn_once_per_run

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota, a file size limit
MAX_INPUT = 64 << 20  # bytes of a file that a user writes, or of a configuration
QUIET_S = 5  # without data from a pipe, after which a line says that the program waits
SHA256 = re.compile("[0-9a-f]{64}")  # in hex
NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system without fsync


def refuse_link(path: Path) -> None:
    """Raise LinkError if ``path`` exists and is not a regular file."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise LinkError(f"{path} is a link to {os.readlink(path)}; remove it")
    if not stat.S_ISREG(mode):
        raise LinkError(f"{path} is not a regular file; choose another name")


def refuse_foreign_link(path: Path) -> None:
    """Raise LinkError if ``path`` is a link that neither this user nor its folder's owner made.

    Source: proc(5), ``protected_symlinks``.
    """
    if path.is_symlink():
        trusted = (os.geteuid(), path.parent.stat().st_uid)
        if path.lstat().st_uid not in trusted:
            raise LinkError(f"{path} is a link of another user, to {os.readlink(path)}; remove it")


def new_file(path: str | Path, flags: int) -> int:
    """An opener that creates a file, after removing a regular file of this name.

    Raises LinkError for a link or special file.
    """
    path = Path(path)
    refuse_link(path)
    path.unlink(missing_ok=True)
    return os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def same_file(path: str | Path, flags: int) -> int:
    """An opener of a regular file; LinkError for a link or special file, without waiting for it."""
    try:
        return plain_file(path, flags | os.O_NOFOLLOW)
    except OSError:
        refuse_link(Path(path))
        raise


def plain_file(path: str | Path, flags: int) -> int:
    """An opener of a regular file or a link to one; LinkError for a special file, without waiting.

    A pipe in a folder that others fill would wait for its writer for ever.
    """
    file = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise LinkError(f"{path} is not a regular file; choose another name")
    return file


def is_file_name(name: object) -> TypeGuard[str]:
    """Whether a value from a file names a file in a folder, without leading out of it."""
    if not isinstance(name, str) or name in ("", "..") or Path(name).name != name or "\0" in name:
        return False
    try:
        return len(os.fsencode(name)) <= 255  # the longest of Linux
    except UnicodeEncodeError:  # half a character
        return False


def read_file(path: Path, max_bytes: int = 2**20) -> bytes:
    """The first ``max_bytes`` of a regular file; LinkError for a link or special file."""
    with open(path, "rb", opener=same_file) as file:
        return file.read(max_bytes)


def read_input(path: str | Path, max_bytes: int = MAX_INPUT) -> bytes:
    """All bytes of a file that a user names; it may be a pipe, which is read while it has a writer.

    Raises OSError, also for more than ``max_bytes`` and for a pipe that nothing writes to: it would
    be waited for without end.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb", buffering=0) as file:
        data = bytearray()
        if stat.S_ISFIFO(os.fstat(handle).st_mode):
            data += _first_of_pipe(handle, path)
        os.set_blocking(handle, True)
        while len(data) <= max_bytes and (
            piece := file.read(min(max_bytes + 1 - len(data), 2**20))
        ):
            data += piece
    if len(data) > max_bytes:
        raise OSError(errno.EOVERFLOW, f"it has more than {max_bytes >> 20} MiB", str(path))
    return bytes(data)


def _first_of_pipe(handle: int, path: str | Path) -> bytes:
    """The first bytes of a pipe; OSError if there are none and no process has it open to write."""
    waits = select.poll()
    waits.register(handle, select.POLLIN)
    try:
        first = os.read(handle, 2**16)
    except BlockingIOError:  # there is a writer
        if not waits.poll(QUIET_S * 1000):
            logging.getLogger("llamax").info("waiting for what is written to the pipe %s", path)
            waits.poll()
        first = os.read(handle, 2**16)
    if not first:
        raise OSError(errno.ENXIO, "it is a pipe that nothing writes to", str(path))
    return first


def make_folder(folder: Path) -> None:
    """Create a folder unless it exists; LinkError if a link has its name."""
    if folder.is_symlink():
        raise LinkError(f"{folder} is a link to {os.readlink(folder)}; remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:  # its parents are made, so it is the file system that refuses
        raise PermissionError(errno.EPERM, "no folder can be made there", str(folder)) from None


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a file to ``target``, unless that is the same file.

    Raises LinkError if ``target`` is a link or special file.
    """
    refuse_link(target)
    if target.exists() and target.samefile(source):
        return
    with open(source, "rb") as file, open(target, "wb", opener=new_file) as copy:
        shutil.copyfileobj(file, copy, 2**20)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves its old content or the new, never a part.

    Raises LinkError if ``path`` is a link or special file.
    """
    refuse_link(path)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb", opener=new_file) as file:
        try:
            file.write(data)
            file.flush()
            sync_handle(file.fileno(), partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def replace_output(path: Path, data: bytes, ours: Callable[[bytes], bool]) -> None:
    """Write the output of a command, but over no other file than an earlier output.

    ``ours``: whether the content of a file is that of an earlier output.  Raises DataError if it is
    not, LinkError for a link or special file, and ConfigError for an address.
    """
    refuse_address(path)
    with suppress(FileNotFoundError):
        before = read_file(path, MAX_INPUT)
        if before and not ours(before):
            raise DataError(f"{path} exists and is not an earlier output; choose another name")
    write_atomic(path, data)


def sync_handle(handle: int, path: Path) -> None:
    """Wait until the open file or folder ``path`` is on disk.

    Where the file system cannot tell, a warning says so once.  Raises OSError with the path.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise OSError(error.errno, error.strerror, str(path)) from None
        _warn_without_sync(os.fstat(handle).st_dev, f"{path}: {error.strerror}")


_without_sync = set[int]()  # the devices of the file systems that the warning has named


def _warn_without_sync(device: int, reason: str) -> None:
    """Log once that a file system cannot sync."""
    if device not in _without_sync:
        _without_sync.add(device)
        warn_once_per_run(
            f"cannot sync {reason}; what was just written there may be lost if the machine fails"
        )


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync_handle(handle, folder)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Make a folder and all its files and folders survive a power cut."""
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                sync_handle(handle, path)
            finally:
                os.close(handle)
        sync_folder(Path(place))


def free_bytes(path: Path) -> int | None:
    """The free bytes of a file system; None where it does not report them."""
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None
    return usage.free if usage.total else None


def show_free(path: Path) -> str:
    """``123 free``, or ``free space unknown``."""
    free = free_bytes(path)
    return "free space unknown" if free is None else f"{free} free"


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb", buffering=0, opener=plain_file) as file:
        return sha256_from(file)


def sha256_from(file: RawIOBase) -> str:
    """The sha256 of what follows in an open file, in hex."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    view = memoryview(buffer)
    while size := file.readinto(buffer):
        digest.update(view[:size])
    return digest.hexdigest()
