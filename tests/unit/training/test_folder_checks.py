"""Training replaces no configuration of the user, and follows no link of another user."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import tiny_run

from llamax.cli.train import main
from llamax.runtime.errors import ConfigError, LinkError
from llamax.training.folder_checks import SIGNS, check_run_folder


def test_a_configuration_of_the_user_is_not_replaced(tmp_path: Path) -> None:
    """As after ``llamax train --config config.toml --run.folder=.``."""
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    tiny_run.make_dataset(dataset)
    path = tiny_run.write(tiny_run.config(dataset, tmp_path), tmp_path / "config.toml")
    path.write_text(text := "# why the rate is so low\n" + path.read_text())
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"run\.folder=.* holds a config\.toml that is not"):
            main(["--config", str(path), "--run.steps=1"])
    assert path.read_text() == text
    assert sorted(each.name for each in tmp_path.iterdir()) == ["config.toml", "dataset"]


@pytest.mark.parametrize("sign", SIGNS)
def test_a_run_may_go_on(tmp_path: Path, sign: str) -> None:
    check_run_folder(tmp_path / "missing")
    check_run_folder(tmp_path)
    (tmp_path / "config.toml").touch()
    (tmp_path / sign).touch()
    check_run_folder(tmp_path)


def test_a_link_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to("../disk")
    check_run_folder(run)  # one's own
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    check_run_folder(run)  # of the owner of the folder
    real = os.stat

    def owned(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        found = real(path, follow_symlinks=follow_symlinks)
        return os.stat_result((*found[:4], 54321, *found[5:])) if path == run else found

    monkeypatch.setattr(os, "stat", owned)
    with pytest.raises(LinkError, match=r"checkpoints is a link of another user, to \.\./disk"):
        check_run_folder(run)
    assert list((tmp_path / "disk").iterdir()) == []
