"""Links and strange things in a compile cache are not followed, sent or removed."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from uuid import uuid4

import pytest
from support.compiled import COMPILER, FOLDER, compiled

from llamax.runtime.errors import LinkError
from llamax.tools.audit.cache_place import Place
from llamax.tools.audit.shared_cache import pull, push

pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"neuronx-cc": COMPILER, "torch-xla": "2.9.0"}
    monkeypatch.setattr("llamax.tools.audit.compile_cache.installed", versions.get)


def test_links_and_changes_are_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiled(tmp_path / "a", "MODULE_1+2", "MODULE_3+4")
    (first / FOLDER / "MODULE_1+2" / "more").symlink_to("/etc/passwd")
    send, neff = Place._send, first / FOLDER / "MODULE_3+4" / "model.neff"

    def changing(place: Place, path: str, data: bytes | Path) -> None:
        neff.write_bytes(b"another")
        send(place, path, data)

    monkeypatch.setattr(Place, "_send", changing)
    place = Place(f"memory://{uuid4().hex}")
    report = push(first, place)
    assert "is a link to /etc/passwd" in report.refused[f"{FOLDER}/MODULE_1+2"]
    assert report.refused[f"{FOLDER}/MODULE_3+4"] == "it changed while it was copied"
    assert place.names() == {}


def test_links_in_a_shared_folder_are_not_followed(tmp_path: Path) -> None:
    """Others may write there: no file of this user is replaced, and no loop is walked."""
    first, mine = compiled(tmp_path / "a", "MODULE_1+2"), tmp_path / "mine"
    place = Place(str(tmp_path / "shared"))
    push(first, place)
    mine.mkdir()
    (mine / "entry.json").write_text("of the user")
    for name in ("round", "round2"):
        (tmp_path / "shared" / name).symlink_to(tmp_path / "shared")
    os.mkfifo(tmp_path / "shared" / FOLDER / "pipe")
    assert len(place.names()) == 4
    linked = tmp_path / "shared" / FOLDER / "MODULE_3+4"
    linked.symlink_to(mine)
    refused = push(compiled(first, "MODULE_3+4"), place).refused
    assert "MODULE_3+4 is a link to" in refused[f"{FOLDER}/MODULE_3+4"]
    assert [path.name for path in mine.iterdir()] == ["entry.json"]
    assert (mine / "entry.json").read_text() == "of the user"


def test_links_in_the_local_cache_are_not_followed(tmp_path: Path) -> None:
    """By default it lies in /var/tmp, where others may put links."""
    place, mine = Place(str(tmp_path / "shared")), tmp_path / "mine"
    push(compiled(tmp_path / "a", "MODULE_1+2"), place)
    mine.mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / FOLDER).symlink_to(mine)
    with pytest.raises(LinkError, match="is a link to"):
        pull(place, tmp_path / "b", COMPILER)
    assert list(mine.iterdir()) == []


@pytest.mark.parametrize("kind", ["notes", "folder", "link", "being compiled"])
def test_what_is_no_failed_compilation_stays(tmp_path: Path, kind: str) -> None:
    place, target = Place(str(tmp_path / "shared")), tmp_path / "b" / FOLDER / "MODULE_1+2"
    push(compiled(tmp_path / "a", "MODULE_1+2"), place)
    target.mkdir(parents=True)
    (target / "model.log").write_text("error")
    lock = target / "model.hlo.pb.lock"
    lock.touch()
    with open(lock) as held:
        if kind == "notes":
            (target / "notes.txt").write_text("of a user")
        elif kind == "folder":
            (target / "profiles").mkdir()
        elif kind == "link":
            (target / "model.a.lock").symlink_to(lock)
        else:
            fcntl.flock(held, fcntl.LOCK_EX)
        before = sorted(path.name for path in target.iterdir())
        (why,) = pull(place, tmp_path / "b", COMPILER).refused.values()
    assert ("pull again later" if kind == "being compiled" else "no compiler made") in why
    assert sorted(path.name for path in target.iterdir()) == before
    assert [path.name for path in target.parent.iterdir()] == ["MODULE_1+2"]
    if kind == "being compiled":
        assert pull(place, tmp_path / "b", COMPILER).copied == [f"{FOLDER}/MODULE_1+2"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["pipe", "file", "link"])
def test_what_is_no_folder_stays_in_the_local_cache(tmp_path: Path, kind: str) -> None:
    place, target = Place(str(tmp_path / "shared")), tmp_path / "b" / FOLDER / "MODULE_1+2"
    push(compiled(tmp_path / "a", "MODULE_1+2"), place)
    target.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(target)
    elif kind == "file":
        target.write_text("notes")
    else:
        target.symlink_to(tmp_path)
    refused = pull(place, tmp_path / "b", COMPILER).refused
    assert refused == {f"{FOLDER}/MODULE_1+2": f"{target} is not a folder; remove it"}
    assert [path.name for path in target.parent.iterdir()] == ["MODULE_1+2"]


def test_the_name_of_a_place_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "shared").symlink_to(tmp_path / "real")
    push(compiled(tmp_path / "a", "MODULE_1+2"), place := Place(str(tmp_path / "shared")))
    assert pull(place, tmp_path / "b", COMPILER).copied == [f"{FOLDER}/MODULE_1+2"]
