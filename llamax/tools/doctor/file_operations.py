"""Tries the operations of a file system that a run needs, in a folder that is removed again.

Object stores and other mounts in user space (mountpoint-s3, gcsfuse, s3fs, 9p) lack some of them.

::

    operation                        what needs it                               without it
    create folders, write files      everything                                  error
    rename a file over another       metrics, configuration, notes of ranks      error
    rename a folder                  a checkpoint, when it is complete           error
    append; write in the middle      metrics.jsonl, heartbeats; token files      error
    map a file into memory           token files                                 error
    delete files and folders         checkpoint.keep, interrupted saves          error
    sync a file, sync a folder       a checkpoint that survives a power cut      warning
    lock a file                      a second run in the same folder             warning
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from llamax.tools.doctor.finding import Finding, Level, passed

PROBE = ".llamax-probe-"  # .llamax-probe-0c5f...: the folder in which the operations are tried
OTHER = "set storage.mount to another file system, such as FSx for Lustre, EFS or a local disk"


class Operation(NamedTuple):
    """An operation to try in an empty folder: ``verb`` completes "cannot ..."."""

    level: Level
    verb: str
    why: str
    fix: str
    attempt: Callable[[Path], None]


def check_operations(folder: Path) -> Iterator[Finding]:
    """Try every operation in a new folder inside ``folder``; one finding for each that fails."""
    probe = folder / f"{PROBE}{secrets.token_hex(8)}"
    failed = False
    try:
        for operation in OPERATIONS:
            try:
                place = probe / operation.verb.replace(" ", "-")
                place.mkdir(parents=True)
                operation.attempt(place)
            except OSError as error:
                failed = True
                yield Finding(
                    operation.level,
                    "file system",
                    f"{folder} cannot {operation.verb}: {error.strerror}",
                    operation.why,
                    operation.fix,
                )
                if not probe.is_dir():
                    return  # not even a folder can be made: nothing else can be tried
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    if os.path.lexists(probe):
        failed = True
        yield Finding(
            "error",
            "file system",
            f"{folder} cannot delete: {probe.name} stays there",
            "old checkpoints and interrupted saves are deleted; the file system would fill up",
            "allow it in the options of the mount (mountpoint-s3: --allow-delete)",
        )
    if not failed:
        yield passed("file system", f"{folder} can rename, append, sync, lock and delete")


def _write(path: Path, data: bytes = b"probe") -> None:
    with open(path, "wb") as file:
        file.write(data)


def _create(place: Path) -> None:
    _write(place / "file")
    (place / "file").read_bytes()


def _rename_file(place: Path) -> None:
    _write(place / "partial")
    _write(place / "file", b"before")
    os.replace(place / "partial", place / "file")


def _rename_folder(place: Path) -> None:
    (place / "step.tmp").mkdir()
    _write(place / "step.tmp" / "file")
    os.rename(place / "step.tmp", place / "step")
    (place / "step" / "file").read_bytes()


def _append(place: Path) -> None:
    _write(place / "file")
    with open(place / "file", "ab") as file:
        file.write(b"more")


def _overwrite(place: Path) -> None:
    _write(place / "file")
    with open(place / "file", "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"P", 0)
        os.ftruncate(file.fileno(), 1)


def _map(place: Path) -> None:
    _write(place / "file")
    with open(place / "file", "rb") as file:
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ).close()


def _sync_file(place: Path) -> None:
    with open(place / "file", "wb") as file:
        file.write(b"probe")
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(place: Path) -> None:
    handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lock(place: Path) -> None:
    with open(place / "lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


POWER = "what was written last may be lost if a node or the storage fails; a run goes on"
OPERATIONS = (
    Operation("error", "create folders and files", "nothing can be saved there", OTHER, _create),
    Operation(
        "error",
        "rename files",
        "configuration, metrics and checkpoints are written under another name first",
        OTHER,
        _rename_file,
    ),
    Operation(
        "error",
        "rename folders",
        "a checkpoint gets its name when it is complete; the run would end at its first save",
        OTHER,
        _rename_folder,
    ),
    Operation("error", "append to files", "metrics.jsonl and logs grow", OTHER, _append),
    Operation(
        "error",
        "write inside files",
        "heartbeats, token files and Hugging Face folders are written so",
        OTHER,
        _overwrite,
    ),
    Operation("error", "map files into memory", "token files are read so", OTHER, _map),
    Operation("warning", "sync files", POWER, OTHER, _sync_file),
    Operation("warning", "sync folders", POWER, OTHER, _sync_folder),
    Operation(
        "warning",
        "lock files",
        "two runs in one folder would not notice each other",
        "start one run at a time in a run.folder",
        _lock,
    ),
)
