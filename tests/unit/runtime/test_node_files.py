"""Files that the processes of a machine share: made once, whole, and trusted only if one's own."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest

from llamax.runtime import node_files
from llamax.runtime.errors import DataError
from llamax.runtime.node_files import KEPT_S, START, private_file, shared_file


class Maker:
    """Writes ``content`` and counts how often."""

    def __init__(self, content: bytes = b"content") -> None:
        self.content, self.calls = content, 0

    def __call__(self, file: IO[bytes]) -> None:
        self.calls += 1
        file.write(self.content)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of shared files, not there yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"llamax-{os.geteuid()}"


def test_a_file_is_made_once_for_all(folder: Path) -> None:
    make = Maker(b"0123456789" * 10**5)
    with ThreadPoolExecutor(8) as pool:  # the lock is of open files, so threads meet it too
        found = [*pool.map(lambda _: shared_file("a", make), range(8))]
    assert make.calls == 1
    assert {each[START:] for each in found} == {make.content}
    assert sorted(path.name for path in folder.iterdir()) == ["a", "a.lock"]
    assert folder.stat().st_mode & 0o777 == 0o700
    shared_file("b", make)
    assert make.calls == 2


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-1], lambda raw: raw[:-1] + b"?", lambda _: b""]
)
def test_a_damaged_file_is_made_again(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    make = Maker()
    shared_file("a", make)
    path = folder / "a"
    path.write_bytes(damage(path.read_bytes()))
    assert shared_file("a", make)[START:] == b"content"
    assert shared_file("a", make)[START:] == b"content"
    assert make.calls == 2


def own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    folder.rename(folder.with_name(f"llamax-{os.geteuid()}"))


def open_to_others(folder: Path, _: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def link(folder: Path, _: pytest.MonkeyPatch) -> None:
    folder.with_name("elsewhere").mkdir(mode=0o700)
    folder.symlink_to("elsewhere")


def a_file(folder: Path, _: pytest.MonkeyPatch) -> None:
    folder.touch()


def linked_file(folder: Path, _: pytest.MonkeyPatch) -> None:
    folder.mkdir(mode=0o700)
    folder.with_name("elsewhere").write_bytes(b"precious")
    (folder / "a").symlink_to("../elsewhere")


@pytest.mark.parametrize("prepare", [own, open_to_others, link, a_file, linked_file])
def test_a_place_that_others_may_fill_is_not_used(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[[Path, pytest.MonkeyPatch], None],
) -> None:
    prepare(folder, monkeypatch)
    before = {path: path.is_file() and path.read_bytes() for path in folder.parent.rglob("*")}
    make = Maker()
    assert shared_file("a", make)[START:] == b"content"
    assert shared_file("a", make)[START:] == b"content"
    assert make.calls == 2
    after = {path: path.is_file() and path.read_bytes() for path in folder.parent.rglob("*")}
    assert before == after


def test_a_process_that_holds_the_lock_too_long_is_not_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(node_files, "WAIT_S", -1)
    with (folder / "a.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert shared_file("a", Maker())[START:] == b"content"
    assert not (folder / "a").exists()


def test_a_mistake_and_a_full_disk_leave_nothing_behind(folder: Path) -> None:
    def refuse(file: IO[bytes]) -> None:
        file.write(b"part")
        raise DataError("a document is too long")

    def fill(file: IO[bytes]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(DataError, match="a document is too long"):
        shared_file("a", refuse)
    for opened in (lambda: shared_file("a", fill), lambda: private_file(fill)):
        with pytest.raises(DataError, match=r"no room for a temporary file in .*TMPDIR"):
            opened()
    assert [path.name for path in folder.iterdir()] == ["a.lock"]


def test_other_errors_are_not_taken_for_a_full_disk(folder: Path) -> None:
    def fail(_: IO[bytes]) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(OSError, match="Input/output error"):
        private_file(fail)


def test_files_of_more_than_a_week_are_removed(folder: Path) -> None:
    make = Maker()
    for name, age in (("old", KEPT_S + 60), ("used", KEPT_S + 60), ("young", KEPT_S - 3600)):
        shared_file(name, make)
        os.utime(folder / name, (time.time() - age,) * 2)
    shared_file("used", make)
    shared_file("new", make)
    left = {path.name for path in folder.iterdir() if path.suffix != ".lock"}
    assert left == {"used", "young", "new"}


def test_no_folder_for_temporary_files_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_folder() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", no_folder)
    with pytest.raises(DataError, match=r"no folder for temporary files .* TMPDIR"):
        shared_file("a", Maker())
