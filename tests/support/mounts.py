"""Mounts that lack an operation: object stores and other file systems in user space.

``lack`` lets calls of this process fail on paths below a folder, with the errno of such a mount.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

Usage = namedtuple("Usage", "total used free")


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mount a tmpfs of ``size`` on a new ``folder``; the test is skipped where that is refused."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this machine mounts no tmpfs for tests")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def lack(monkeypatch: pytest.MonkeyPatch, operation: str, folder: Path, code: int = 0) -> None:
    """Let ``operation`` fail with ``code``, or with the usual errno, below ``folder``."""

    def inside(path: object) -> bool:
        if isinstance(path, int) or hasattr(path, "fileno"):
            number = path if isinstance(path, int) else path.fileno()
            path = os.readlink(f"/proc/self/fd/{number}")
        return Path(os.fsdecode(path)).is_relative_to(folder)  # type: ignore[arg-type]

    def fails_on(module: Any, name: str, number: int, hit: Callable[..., bool]) -> None:
        real = getattr(module, name)

        def call(path: Any, *rest: Any, **named: Any) -> Any:
            if not inside(path) or not hit(path):
                return real(path, *rest, **named)
            number_ = code or number
            names = (str(path), None, str(rest[0])) if name in ("rename", "replace") else ()
            raise OSError(number_, os.strerror(number_), *names)

        monkeypatch.setattr(module, name, call)

    def folder_handle(path: Any) -> bool:
        return os.path.isdir(f"/proc/self/fd/{path}")

    if operation == "rename folders":
        fails_on(os, "rename", errno.ENOSYS, os.path.isdir)
        fails_on(os, "replace", errno.ENOSYS, os.path.isdir)
    elif operation == "rename":
        fails_on(os, "rename", errno.ENOSYS, lambda path: True)
        fails_on(os, "replace", errno.ENOSYS, lambda path: True)
    elif operation == "sync folders":
        fails_on(os, "fsync", errno.EINVAL, folder_handle)
    elif operation == "sync":
        fails_on(os, "fsync", errno.ENOSYS, lambda path: True)
    elif operation == "lock":
        fails_on(fcntl, "flock", errno.ENOSYS, lambda path: True)
    elif operation == "write inside":
        fails_on(os, "pwrite", errno.EOPNOTSUPP, lambda path: True)
    elif operation == "delete":
        monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
    else:
        assert operation == "report free space"
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 0))
