"""Files and folders that appear complete or not at all, with disk errors as one line.

::

    with new_folder(out) as folder:     OUT.part-0c5f.../OUT, new; OUT.part-0c5f.../lock, held
        ...                             filled; removed again after an error, SIGTERM or Ctrl-C
                                        synced to disk, renamed to OUT; OUT.part-0c5f... removed

The lock lies beside the content, so it is held until after the rename and OUT never contains it.
What a killed process left has a free lock and is removed by the next one that makes OUT; nothing
else is deleted.

``write_durable`` replaces a file and syncs it to disk; ``write_note`` only shows a small file
to other ranks at once.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llamax.checkpoint.lock import lock_abandoned, lock_folder
from llamax.config.constants import LOCK_FILE
from llamax.runtime.address import refuse_address
from llamax.runtime.errors import CheckpointError, LlamaxError, NoRoom, Terminated
from llamax.runtime.files import (
    NO_ROOM,
    new_file,
    read_file,
    show_free,
    sync_folder,
    sync_tree,
    write_atomic,
)
from llamax.runtime.json_reader import MAX_BYTES, JsonError, parse_json
from llamax.runtime.logging import logger

BUILDING = ".part-"  # OUT.part-0c5f...: the folder in which OUT is built


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
        raise NoRoom(
            f"no room for {path} ({error.strerror}): {needed_bytes} bytes needed, "
            f"{show_free(path.parent)}; make room or write elsewhere"
        ) from None


def write_note(path: Path, text: str) -> None:
    """Show a small file to other ranks, complete but not yet durable.

    A rank that sees it may rename the folder at once, so nothing is synced afterwards.
    """
    with explain_write_errors(path, len(text)):
        partial = path.with_name(path.name + ".part")
        with open(partial, "w", encoding="utf-8", opener=new_file) as file:
            file.write(text)
        os.replace(partial, path)


def read_note(path: Path) -> Any:
    """The value in a note that ``write_note`` wrote; CheckpointError if it is damaged or a link."""
    try:
        return parse_json(read_file(path, MAX_BYTES))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except JsonError as error:
        raise CheckpointError(f"{path} {error}; see the log of that rank") from None


def failure_note(error: BaseException) -> str:
    """The text of a note that tells other ranks why this one failed."""
    why = str(error) if isinstance(error, LlamaxError) else repr(error)
    return json.dumps({"why": why, "no_room": isinstance(error, NoRoom)})


def failure_of(note: Any, what: str) -> CheckpointError:
    """The error of another rank, from its ``failure_note``."""
    note = note if isinstance(note, dict) else {}
    error = NoRoom if note.get("no_room") is True else CheckpointError
    return error(f"{what}: {note.get('why', 'see its log')}")


def write_durable(path: Path, data: bytes) -> None:
    """Replace a file on disk: after a crash it has the old content or the new one."""
    with explain_write_errors(path, len(data)):
        write_atomic(path, data)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to fill; sync it and rename it to ``out`` at the end, or remove it after an
    error.

    SIGTERM raises Terminated.  Raises CheckpointError if ``out`` is a link or exists and is not an
    empty folder, or if another process makes it; NoRoom if the disk is full; ConfigError for an
    address.
    """
    refuse_address(out)
    with explain_write_errors(out, 0):
        if out.is_symlink():
            raise CheckpointError(
                f"{out} is a link to {os.readlink(out)}; remove it or choose another `out`"
            )
        out = Path(os.path.realpath(out))
        _remove_abandoned(out)
        if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
            raise CheckpointError(f"{out} exists already; remove it or choose another `out`")
        parents = [folder for folder in out.parents if not folder.exists()]
    building = out.with_name(f"{out.name}{BUILDING}{secrets.token_hex(8)}")
    content, complete = building / out.name, False
    with _terminable(out) as (finishing, terminated):
        try:
            with explain_write_errors(building, 0):
                out.parent.mkdir(parents=True, exist_ok=True)
                building.mkdir(mode=0o700)
            with lock_folder(building, timeout_s=0):
                try:
                    with explain_write_errors(content, 0):
                        content.mkdir()
                    with _explain_no_room(content):
                        yield content
                    with explain_write_errors(out, 0):
                        sync_tree(content)
                        finishing()
                        if terminated:  # where Python drops exceptions, such as in a destructor
                            raise terminated[0]
                        os.rename(content, out)
                        complete = True
                        for folder in (out, *parents):
                            sync_folder(folder.parent)
                finally:
                    finishing()
                    shutil.rmtree(content, ignore_errors=True)
        except BaseException as error:
            if terminated and error is not terminated[0]:  # it was wrapped, as by __set_name__
                raise terminated[0] from None
            raise
        finally:  # the lock is closed by now: a network file system keeps a file that is open
            finishing()
            shutil.rmtree(building, ignore_errors=True)
            with suppress(OSError):  # a parent with something else in it stays
                for folder in () if complete else parents:
                    folder.rmdir()


def _remove_abandoned(out: Path) -> None:
    """Remove what killed processes left of ``out``; log a warning for what may not be theirs.

    Raises CheckpointError if a living process makes ``out`` now.
    """
    if not out.parent.is_dir():
        return
    pattern = re.compile(re.escape(out.name + BUILDING) + "[0-9a-f]{16}")
    for folder in [path for path in out.parent.iterdir() if pattern.fullmatch(path.name)]:
        with lock_abandoned(folder) as abandoned:
            if abandoned and (proven := {*os.listdir(folder)} <= {LOCK_FILE, out.name}):
                shutil.rmtree(folder / out.name, ignore_errors=True)
        if abandoned and proven:
            shutil.rmtree(folder, ignore_errors=True)
        if os.path.lexists(folder):
            logger.warning("%s may be the rest of a killed process; remove it if so", folder)


@contextmanager
def _explain_no_room(path: Path) -> Iterator[None]:
    """Raise an OSError of a full disk as NoRoom; no other, as it may be an error of reading."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        where, free = error.filename or path, shutil.disk_usage(path).free
        raise NoRoom(
            f"no room for {where} ({error.strerror}): {free} bytes free; make room or write "
            "elsewhere"
        ) from None


@contextmanager
def _terminable(out: Path) -> Iterator[tuple[Callable[[], None], list[Terminated]]]:
    """Raise Terminated on SIGTERM, if this is the main thread and the signal has no handler yet.

    Yields a function to call before the last steps, the rename or the removal: from then on SIGTERM
    and Ctrl-C are ignored; and a list of what SIGTERM has raised.
    """
    asked: list[Terminated] = []

    def terminate(number: int, frame: object) -> None:
        ignore()
        asked.append(Terminated(f"stopped by SIGTERM: {out} was not written"))
        raise asked[0]

    def ignore() -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
        before = {n: handler for n, handler in usual.items() if signal.getsignal(n) == handler}
    try:
        if signal.SIGTERM in before:
            signal.signal(signal.SIGTERM, terminate)
        yield ignore, asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
