"""Files and folders are written and read without following a link; file systems without sync."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.mounts import lack

from llamax.runtime import files
from llamax.runtime.errors import DataError, LinkError
from llamax.runtime.files import (
    copy_file,
    make_folder,
    new_file,
    plain_file,
    read_file,
    read_input,
    refuse_link,
    same_file,
    sha256,
    sync_tree,
    write_atomic,
)

WRITERS: dict[str, Callable[[Path], object]] = {
    "new_file": lambda path: open(path, "wb", opener=new_file).close(),
    "same_file": lambda path: open(path, "ab", opener=same_file).close(),
    "copy_file": lambda path: copy_file(path.with_name("target"), path),
    "write_atomic": lambda path: write_atomic(path, b"new"),
    "refuse_link": refuse_link,
    "read_file": read_file,
}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.write_text("precious")
    return path


@pytest.mark.parametrize("name", WRITERS)
def test_a_link_is_not_followed_and_named(tmp_path: Path, target: Path, name: str) -> None:
    for points_to in ("target", "missing"):
        link = tmp_path / "link"
        link.symlink_to(points_to)
        with pytest.raises(LinkError, match=rf"link is a link to {points_to}; remove it"):
            WRITERS[name](link)
        assert os.readlink(link) == points_to
        link.unlink()
    assert target.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.timeout(300)  # a pipe waits for its other end
@pytest.mark.parametrize("name", WRITERS)
def test_a_special_file_is_refused(tmp_path: Path, target: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for special in ("pipe", "folder"):
        refused = rf"{special} is not a regular file; choose another name"
        with pytest.raises(LinkError, match=refused):
            WRITERS[name](tmp_path / special)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe", "target"]


def test_a_stale_partial_file_is_replaced_and_a_linked_one_is_not(
    tmp_path: Path, target: Path
) -> None:
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    partial.write_text("half")
    other = tmp_path / "other name of it"
    os.link(partial, other)
    write_atomic(out, b"new")
    assert (out.read_text(), other.read_text()) == ("new", "half"), "the stale file is not reused"
    partial.symlink_to(target)
    with pytest.raises(LinkError, match=r"\.out\.partial is a link to .*target; remove it"):
        write_atomic(out, b"newer")
    assert partial.is_symlink()
    assert (out.read_text(), target.read_text()) == ("new", "precious")


@pytest.mark.timeout(300)  # a pipe would wait for its other end
def test_a_plain_file_is_no_pipe(tmp_path: Path, target: Path) -> None:
    (tmp_path / "link").symlink_to(target)
    for path in (target, tmp_path / "link"):
        with open(path, opener=plain_file) as file:
            assert file.read() == "precious"
    assert sha256(tmp_path / "link") == hashlib.sha256(b"precious").hexdigest()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to-pipe").symlink_to("pipe")
    for name in ("pipe", "to-pipe"):
        with pytest.raises(LinkError, match=f"{name} is not a regular file"):
            sha256(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        sha256(tmp_path / "missing")


@pytest.mark.timeout(300)
def test_an_input_may_be_a_pipe_that_has_a_writer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = b"line\n" * 50_000
    (tmp_path / "file").write_bytes(text)
    os.mkfifo(pipe := tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "file"], stdout=subprocess.PIPE) as cat:
        assert cat.stdout is not None
        assert read_input(f"/dev/fd/{cat.stdout.fileno()}") == text  # what <(...) gives
    with subprocess.Popen(["bash", "-c", f"echo ready; cat {tmp_path}/file > {pipe}"]) as writer:
        os.set_blocking(reads := os.open(pipe, os.O_RDONLY), True)  # once it has opened the pipe
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        assert read_input(pipe) + os.read(reads, 1) == text
        os.close(reads)
        assert not writer.wait()
    silent = os.open(pipe, os.O_RDWR)
    monkeypatch.setattr(files, "QUIET_S", 0)

    class Writes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            os.write(silent, b"at last")
            os.close(silent)

    monkeypatch.setattr(logging.getLogger("llamax"), "handlers", [handler := Writes()])
    monkeypatch.setattr(logging.getLogger("llamax"), "level", logging.INFO)
    assert read_input(pipe) == b"at last"
    handler.close()


@pytest.mark.timeout(300)  # a pipe would wait for its writer
def test_an_input_that_gives_nothing_or_too_much_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a pipe that nothing writes to"):
        read_input(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"x" * 2**20)
    (tmp_path / "link").symlink_to("file")
    assert len(read_input(tmp_path / "link", 2**20)) == 2**20
    for path in (tmp_path / "link", Path("/dev/zero")):
        with pytest.raises(OSError, match="it has more than 0 MiB"):
            read_input(path, 2**20 - 1)
    assert read_input("/dev/null") == b""
    with pytest.raises(IsADirectoryError):
        read_input(tmp_path)


def test_a_link_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    with pytest.raises(LinkError, match="link is a link to elsewhere; remove it"):
        make_folder(tmp_path / "link")
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    if sys.platform == "linux":  # /proc makes no folders, and says that one is missing
        with pytest.raises(PermissionError, match="no folder can be made there: '/proc/llamax"):
            make_folder(Path("/proc/llamax/run"))
    with pytest.raises(FileExistsError):
        make_folder(make_file(tmp_path / "file"))


def make_file(path: Path) -> Path:
    path.write_text("x")
    return path


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_modes_follow_the_umask(tmp_path: Path, target: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        for name in ("new_file", "same_file", "copy_file", "write_atomic"):
            WRITERS[name](tmp_path / name)
        make_folder(tmp_path / "folder")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes.pop("folder") == 0o777 & ~mask
    del modes["target"]
    assert set(modes.values()) == {0o666 & ~mask}
    assert len(modes) == 4


def test_files_that_are_no_link(tmp_path: Path, target: Path) -> None:
    copy_file(target, tmp_path / "copy")
    with open(tmp_path / "copy", "ab", opener=same_file) as file:
        file.write(b"!")
    assert read_file(tmp_path / "copy") == b"precious!"
    assert read_file(tmp_path / "copy", 3) == b"pre"
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "missing")
    refuse_link(tmp_path / "missing")
    sync_tree(tmp_path)


@pytest.mark.parametrize("operation", ["sync folders", "sync"])
def test_a_file_system_without_sync_is_named_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    operation: str,
) -> None:
    logging.getLogger("llamax").propagate = True
    monkeypatch.setattr(files, "_without_sync", set())
    lack(monkeypatch, operation, tmp_path)
    for text in (b"first", b"second"):
        files.write_atomic(tmp_path / "note", text)
        assert (tmp_path / "note").read_bytes() == text
    files.sync_tree(tmp_path)
    (record,) = {id(record): record for record in caplog.records}.values()
    assert record.levelno == logging.WARNING
    assert f"cannot sync {tmp_path}" in record.message


def test_a_sync_that_fails_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lack(monkeypatch, "sync folders", tmp_path, errno.EIO)
    with pytest.raises(OSError, match="Input/output error") as caught:
        files.write_atomic(tmp_path / "note", b"text")
    assert caught.value.filename == str(tmp_path)


def test_free_space_that_is_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.show_free(tmp_path).split()[1:] == ["free"]
    assert files.free_bytes(tmp_path / "none") is None
    lack(monkeypatch, "report free space", tmp_path)
    assert files.free_bytes(tmp_path) is None
    assert files.show_free(tmp_path) == "free space unknown"


def test_names_of_files_lead_nowhere() -> None:
    for name in ("a.b", "é", ".hidden", "-x"):
        assert files.is_file_name(name)
    for other in ("", ".", "..", "a/b", "/a", "a/", "a\0", "\ud800", "é" * 128, 3, None, ["a"]):
        assert not files.is_file_name(other)


def test_an_output_replaces_only_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "page"
    for content in (b"a page", b"another page"):
        files.replace_output(path, content, lambda before: b"page" in before)
        assert path.read_bytes() == content
    path.write_bytes(b"")
    files.replace_output(path, b"a page", lambda before: b"page" in before)
    path.write_bytes(b"notes of the user")
    with pytest.raises(DataError, match="page exists and is not an earlier output; choose"):
        files.replace_output(path, b"a page", lambda before: b"page" in before)
    assert path.read_bytes() == b"notes of the user"
    path.unlink()
    (tmp_path / "other").write_bytes(b"a page")
    path.symlink_to(tmp_path / "other")
    with pytest.raises(LinkError):
        files.replace_output(path, b"new", lambda before: True)
    assert (tmp_path / "other").read_bytes() == b"a page"
