"""A new folder appears complete or not at all, and nothing that llamax did not make is deleted."""

from __future__ import annotations

import errno
import logging
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.mounts import lack

from llamax.checkpoint.atomic import new_folder
from llamax.runtime.errors import CheckpointError, NoRoom, Terminated


def build(out: Path, name: str = "new") -> None:
    """Make ``out`` with one file and one folder in it."""
    with new_folder(out) as folder:
        (folder / "below").mkdir()
        (folder / "below" / name).write_text("new")


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM, errno.EIO])
def test_a_file_system_that_cannot_rename_folders_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    lack(monkeypatch, "rename folders", tmp_path, code)
    with pytest.raises(CheckpointError, match=f"cannot write .*out: {os.strerror(code)}"):
        build(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def killed(out: Path) -> Path:
    """The rest of a process that was killed while it made ``out``."""
    before = set(out.parent.iterdir())
    child = os.fork()
    if child == 0:
        with new_folder(out) as folder:
            (folder / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (rest,) = set(out.parent.iterdir()) - before
    return rest


@pytest.mark.parametrize("name", ["hub.part", "hub.part-0123456789abcdef", "hub.part-mine"])
def test_a_users_folder_of_a_similar_name_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / name / "of").mkdir(parents=True)
    (tmp_path / name / "precious").write_text("x")
    (tmp_path / name / "lock").write_text("pid 1 on elsewhere since then\n")
    before = names(tmp_path)
    build(tmp_path / "hub")
    assert names(tmp_path) == sorted([*before, "hub", "hub/below", "hub/below/new"])
    assert (tmp_path / name / "precious").read_text() == "x"


@pytest.mark.parametrize("name", ["hub.part", "hub.part-0123456789abcdef"])
def test_a_link_of_a_similar_name_is_not_followed(tmp_path: Path, name: str) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious").write_text("x")
    (tmp_path / name).symlink_to(target)
    build(tmp_path / "hub")
    assert (tmp_path / name).is_symlink()
    assert names(target) == ["precious"]


@pytest.mark.parametrize("target", ["empty", "full", "missing"])
def test_a_link_is_no_output(tmp_path: Path, target: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    out = tmp_path / "hub"
    out.symlink_to(target)
    before = names(tmp_path)
    with pytest.raises(CheckpointError, match=rf"hub is a link to {target}; remove it or choose"):
        build(out)
    assert names(tmp_path) == before


def test_only_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    build(tmp_path / "empty")
    assert names(tmp_path / "empty") == ["below", "below/new"]
    (tmp_path / "file").write_text("x")
    for name in ("empty", "file"):
        with pytest.raises(CheckpointError, match=f"{name} exists already; remove it or choose"):
            build(tmp_path / name)
    late = tmp_path / "late"
    with pytest.raises(CheckpointError, match=r"cannot write .*late"), new_folder(late):
        late.write_text("made meanwhile")
    assert late.read_text() == "made meanwhile"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "late"]


def test_a_folder_has_one_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, in_use = tmp_path / "hub", r"hub.part-\w{16} is in use by pid \d+ on .*; wait for it"
    rename, tried = os.rename, []

    def other(source: Path, target: Path) -> None:
        with pytest.raises(CheckpointError, match=in_use):
            build(out)
        tried.append(target)
        rename(source, target)

    with new_folder(out) as folder:
        (folder / "first").write_text("x")
        with pytest.raises(CheckpointError, match=in_use):
            build(out)
        monkeypatch.setattr(os, "rename", other)
    assert tried == [out], "the lock is held until the folder has its name"
    assert names(tmp_path) == ["hub", "hub/first"]


def test_the_rest_of_a_killed_process_is_removed_by_the_next(tmp_path: Path) -> None:
    rest = killed(tmp_path / "hub")
    assert names(rest) == ["hub", "hub/half", "lock"]
    build(tmp_path / "other")
    assert rest.exists(), "it is of another output"
    build(tmp_path / "hub")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "other"]


@pytest.mark.parametrize("change", ["another file", "another machine", "no lock", "a linked lock"])
def test_what_is_not_proven_to_be_a_rest_is_named_and_stays(
    tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("llamax").propagate = True
    rest = killed(tmp_path / "hub")
    if change == "another file":
        (rest / "precious").write_text("x")
    elif change == "another machine":
        (rest / "lock").write_text("pid 1 on elsewhere since then\n")
    else:
        (rest / "lock").rename(tmp_path / "moved")
        if change == "a linked lock":
            (rest / "lock").symlink_to(tmp_path / "moved")
    before = names(rest)
    build(tmp_path / "hub")
    assert names(rest) == before
    assert f"{rest} may be the rest of a killed process; remove it if so" in caplog.text


def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    for mask in (0o022, 0o027, 0o002):
        before = os.umask(mask)
        try:
            with new_folder(tmp_path / f"{mask:o}") as folder:
                assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / f"{mask:o}").stat().st_mode) == 0o777 & ~mask


def test_all_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    rename, fsync = os.rename, os.fsync

    def record_fsync(handle: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def record_rename(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    build(tmp_path / "over" / "hub")
    at = events.index("rename")
    assert sorted(events[:at]) == ["below", "hub", "new"]
    assert events[at + 1 :] == ["over", tmp_path.name]


@pytest.fixture
def interrupted() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, as in a program."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_nothing(tmp_path: Path, interrupted: None) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a" / "b" / "hub"):
        os.kill(os.getpid(), signal.SIGINT)
    assert not list(tmp_path.iterdir())


def test_sigterm_leaves_nothing(tmp_path: Path) -> None:
    message = r"stopped by SIGTERM: .*hub was not written"
    with pytest.raises(Terminated, match=message) as caught, new_folder(tmp_path / "hub"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.exit_code == 143
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_code_that_catches_every_error_takes_no_sigterm_for_one(tmp_path: Path) -> None:
    """Such as a tokenizer's: whatever its engine raises means that the file is no tokenizer."""

    def load() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            raise CheckpointError("it is no tokenizer") from None

    with pytest.raises(Terminated), new_folder(tmp_path / "hub"):
        load()
    assert not list(tmp_path.iterdir())


def test_sigterm_that_python_wraps_is_no_error(tmp_path: Path) -> None:
    """Python before 3.12 turns what ``__set_name__`` raises into a RuntimeError: in an import."""

    def load() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as error:
            raise RuntimeError("Error calling __set_name__") from error

    with pytest.raises(Terminated, match="was not written"), new_folder(tmp_path / "hub"):
        load()
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_sigterm_in_a_destructor_is_not_lost(tmp_path: Path) -> None:
    """Python prints what a destructor raises, and goes on."""

    class Signals:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated, match="was not written"), new_folder(tmp_path / "hub"):
        Signals()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("call", ["rename", "rmdir"])
def test_a_signal_at_the_end_comes_too_late(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interrupted: None,
    call: str,
    number: signal.Signals,
) -> None:
    """During the rename and the removal of the folder around: all is done, and nothing is left."""
    real, handler = getattr(os, call), signal.getsignal(number)

    def signalled(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), number)
        return real(*args, **options)

    monkeypatch.setattr(os, call, signalled)
    build(tmp_path / "hub")
    assert names(tmp_path) == ["hub", "hub/below", "hub/below/new"]
    assert signal.getsignal(number) == handler


def test_a_full_disk_is_one_line_and_an_error_of_reading_stays_one(tmp_path: Path) -> None:
    line = r"no room for .*hub.part-\w+/hub .No space left"
    with pytest.raises(NoRoom, match=line), new_folder(tmp_path / "hub"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="Input/output error"), new_folder(tmp_path / "hub"):
        raise OSError(errno.EIO, "Input/output error")
    assert not list(tmp_path.iterdir())


def test_a_parent_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("file", "loop"):
        with pytest.raises(CheckpointError, match=rf"cannot write .*{name}/hub"):
            build(tmp_path / name / "hub")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]
