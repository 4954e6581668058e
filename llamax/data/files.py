"""Files that are either there, whole, or not there; and a full disk told plainly."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llamax.errors import DataError


def write_atomic(path: Path, raw: bytes) -> None:
    """Write a file under a temporary name, put it on disk, then give it its name."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def room_for(folder: Path, needed_bytes: int) -> Iterator[None]:
    """Turn a disk that fills up in the block into a DataError with ``needed_bytes``."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder).free
        raise DataError(
            f"{folder}: no space left: about {needed_bytes} bytes needed, {free} free; make room "
            "or choose another --out, then run the same command again: finished parts are kept"
        ) from None


def sha256(path: Path) -> str:
    """The hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()
