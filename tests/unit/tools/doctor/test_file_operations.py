"""The doctor on mounts that lack an operation of a file system."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import pytest
from support.hosts import levels
from support.mounts import lack

from llamax.config.load import load_config
from llamax.tools.doctor import Host, storage
from llamax.tools.doctor.file_operations import check_operations
from llamax.training.resolve import resolve


def test_a_file_system_that_can_everything_is_fine_and_stays_empty(tmp_path: Path) -> None:
    assert levels(check_operations(tmp_path)) == {"file system": "ok"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("operation", "level", "whats"),
    [
        ("rename folders", "error", ["cannot rename folders: Function not implemented"]),
        (
            "rename",
            "error",
            [f"cannot rename {kind}: Function not implemented" for kind in ("files", "folders")],
        ),
        ("sync folders", "warning", ["cannot sync folders: Invalid argument"]),
        (
            "sync",
            "warning",
            [f"cannot sync {kind}: Function not implemented" for kind in ("files", "folders")],
        ),
        ("lock", "warning", ["cannot lock files: Function not implemented"]),
        ("write inside", "error", ["cannot write inside files: Operation not supported"]),
    ],
)
def test_a_missing_operation_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, level: str, whats: list[str]
) -> None:
    lack(monkeypatch, operation, tmp_path)
    found = list(check_operations(tmp_path))
    assert levels(found) == {"file system": level}
    assert [each.what for each in found] == [f"{tmp_path} {what}" for what in whats]
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_deleted_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lack(monkeypatch, "delete", tmp_path)
    (finding,) = check_operations(tmp_path)
    assert finding.level == "error"
    assert f"{tmp_path} cannot delete: .llamax-probe-" in finding.what


def test_a_folder_in_which_nothing_can_be_made_is_one_finding(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (finding,) = check_operations(tmp_path / "file")
    assert (finding.level, finding.name) == ("error", "file system")
    assert finding.what.endswith("cannot create folders and files: Not a directory")


@pytest.mark.parametrize("code", ["ESTALE", "ENOTCONN", "EIO"])
def test_a_mount_that_is_gone_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    number = getattr(errno, code)

    def gone(path: Path) -> bool:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "is_dir", gone)
    (finding,) = storage.check(Host(), tmp_path, 1, 0)
    assert finding.level == "error"
    assert finding.what == f"{tmp_path} cannot be read: {os.strerror(number)}"


def test_space_that_is_not_reported_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = resolve(load_config("demo", []), 4)
    assert levels(storage.disk(tmp_path, run, None)) == {"disk": "ok"}
    lack(monkeypatch, "report free space", tmp_path)
    (finding,) = storage.disk(tmp_path, run, None)
    assert finding.level == "warning"
    assert finding.what.endswith(f"; {tmp_path} does not report its free space")


@pytest.mark.parametrize(
    "text",
    ["", '{"node": "oth', "null", "[]", '"x"', "{}", '{"node": "other"}', '{"time": 1}']
    + [json.dumps({"node": node, "time": at}) for node, at in (("o", None), ("o", "x"), (None, 1))]
    + ['{"node": "o", "time": NaN}', '{"node": "o", "time": 1e999}', "[" * 100_000],
)
def test_a_beacon_that_is_not_whole_is_skipped(tmp_path: Path, text: str) -> None:
    place = tmp_path / storage.BEACONS
    place.mkdir()
    (place / "broken.json").write_text(text)
    (place / "folder.json").mkdir()
    assert levels(storage._beacons(tmp_path, 2, 0.0, "me")) == {"shared": "unknown"}
    (place / "good.json").write_text(json.dumps({"node": "good", "time": time.time()}))
    assert levels(storage._beacons(tmp_path, 2, 1.0, "me")) == {"shared": "ok", "clock skew": "ok"}


def test_a_beacon_that_cannot_be_written_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lack(monkeypatch, "rename", tmp_path)
    (finding,) = storage._beacons(tmp_path, 2, 1.0, "me")
    assert (finding.level, finding.name) == ("unknown", "shared")
    assert "cannot be written: Function not implemented" in finding.what
    assert list((tmp_path / storage.BEACONS).iterdir()) == []
