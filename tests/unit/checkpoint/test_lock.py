"""The lock of a run folder: its owner, and folders that cannot be locked."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from support.run_folders import NOW, make_run

from llamax.checkpoint import lock
from llamax.runtime.errors import CheckpointError, NoRoom
from llamax.tools.monitor.run_folder import read_run

# --- locks ---------------------------------------------------------------------------------------


def test_a_lock_names_its_owner_and_ends_with_it(tmp_path: Path) -> None:
    with lock.lock_folder(tmp_path / "run"):
        owner = rf"run is in use by pid {os.getpid()} on .* since "
        with pytest.raises(CheckpointError, match=owner), lock.lock_folder(tmp_path / "run", 0.2):
            pass
    with lock.lock_folder(tmp_path / "run", 0.0):
        pass
    child = os.fork()
    if child == 0:
        with lock.lock_folder(tmp_path / "run"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with lock.lock_folder(tmp_path / "run", 0.0):
        assert f"pid {os.getpid()}" in (tmp_path / "run" / "lock").read_text()


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("run", "link"):
        with (
            pytest.raises(CheckpointError, match=f"{name} is not a folder; remove it or choose"),
            lock.lock_folder(tmp_path / name),
        ):
            pass


def test_a_folder_that_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("llamax").propagate = True
    codes = iter([errno.ENOLCK, errno.EIO])

    def cannot(*args: Any) -> None:
        raise OSError(next(codes), "No locks available")

    monkeypatch.setattr(fcntl, "flock", cannot)
    with lock.lock_folder(tmp_path):
        assert "cannot lock files" in caplog.text
    with (
        pytest.raises(CheckpointError, match=r"cannot lock .*: No locks"),
        lock.lock_folder(tmp_path),
    ):
        pass
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match=r"cannot write .*below/lock: Not a directory"),
        lock.lock_folder(tmp_path / "file" / "below"),
    ):
        pass


def test_a_lock_shows_whether_a_run_on_this_machine_is_alive(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", 12)
    with lock.lock_folder(folder):
        assert read_run(folder, NOW + 9999).state == "running"
    assert read_run(folder, NOW + 5).state == "stopped"
    (folder / "lock").write_text("pid 1 on elsewhere since then\n")
    assert read_run(folder, NOW + 5).state == "running"
    assert read_run(folder, NOW + 9999).state == "dead"


def test_an_owner_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for code, line in (
        (errno.ENOSPC, r"no room for .*lock \(No space left on device\); make room or"),
        (errno.EIO, r"cannot write .*lock: Input/output error"),
    ):

        def fail(*args: Any, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "pwrite", fail)
        with pytest.raises(CheckpointError, match=line) as caught, lock.lock_folder(tmp_path):
            pass
        assert isinstance(caught.value, NoRoom) == (code == errno.ENOSPC)
