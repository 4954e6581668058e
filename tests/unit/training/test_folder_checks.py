"""Training replaces no configuration of the user, and follows no link of another user."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import tiny_run

from llamax.cli.train import main
from llamax.runtime.errors import ConfigError, LinkError
from llamax.training.folder_checks import REPLACED, check_run_folder


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


@pytest.mark.parametrize("sign", ["lock", "metrics.jsonl", "checkpoints"])
def test_a_run_may_go_on(tmp_path: Path, sign: str) -> None:
    check_run_folder(tmp_path / "missing")
    check_run_folder(tmp_path)
    (tmp_path / "config.toml").touch()
    (tmp_path / sign).touch()
    check_run_folder(tmp_path)


def test_a_run_that_another_rank_begins_meanwhile_is_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_file = Path.is_file

    def begun(path: Path) -> bool:
        (tmp_path / "lock").write_text("pid 1 on host since 12:00\n")
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", begun)  # after the first look at the empty folder
    check_run_folder(tmp_path)


RECORD = '{"step": 1, "loss": 2.0, "consumed_tokens": 5, "tokens_per_s": 1.5}\n'


@pytest.mark.parametrize("name", REPLACED)
@pytest.mark.parametrize("beside", ["", "config.toml", "metrics.jsonl", "lock", "checkpoints"])
def test_files_of_another_program_are_not_replaced(tmp_path: Path, name: str, beside: str) -> None:
    if beside == "checkpoints":
        (tmp_path / beside / "epoch-1").mkdir(parents=True)
    elif beside:
        (tmp_path / beside).write_text('{"step": 1, "epoch": 3}\n')
    (tmp_path / name).write_text("[notes]\n")
    with pytest.raises(ConfigError, match=r"run\.folder=.* holds a .* that is not of a run"):
        check_run_folder(tmp_path)


@pytest.mark.parametrize(("name", "kind"), [("config.json", "model"), ("dataset.json", "dataset")])
def test_a_model_or_a_dataset_does_not_become_a_run(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_text("{}")
    says = rf"run\.folder=.* is the folder of a {kind}; set run\.folder to .*/run for example"
    with pytest.raises(ConfigError, match=says):
        check_run_folder(tmp_path)
    (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)
    check_run_folder(tmp_path)


@pytest.mark.parametrize("sign", ["lock", "metrics.jsonl", "checkpoints"])
def test_a_run_is_known_by_what_it_has_written(tmp_path: Path, sign: str) -> None:
    for name in ("config.toml", "environment.json"):
        (tmp_path / name).write_text("[run]\n")
    if sign == "checkpoints":
        (tmp_path / sign / "step-00000005").mkdir(parents=True)
    else:
        owner = "pid 12 on a host since Sun Nov 29 19:15:13 2026\n"
        (tmp_path / sign).write_text(owner if sign == "lock" else RECORD * 3)
    check_run_folder(tmp_path)


def test_what_stands_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "unmounted" / "run")
    for name, words in (
        ("file", f"{tmp_path / 'file'} is a file; set run.folder to another folder"),
        ("file/run", f"{tmp_path / 'file'} is a file; set run.folder to another folder"),
        ("link", f"link is a link to {tmp_path / 'unmounted' / 'run'}, which is not there (is"),
        ("link/run/a", f"link is a link to {tmp_path / 'unmounted' / 'run'}, which is not there"),
    ):
        with pytest.raises(ConfigError) as refused:
            check_run_folder(tmp_path / name)
        assert f"run.folder={tmp_path / name} cannot be made: " in str(refused.value)
        assert words in str(refused.value)
    (tmp_path / "there").mkdir()
    (tmp_path / "good").symlink_to(tmp_path / "there")
    check_run_folder(tmp_path / "good")
    check_run_folder(tmp_path / "good" / "run" / "deep")


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
