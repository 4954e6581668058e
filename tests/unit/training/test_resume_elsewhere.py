"""``checkpoint.resume`` names a folder outside the run: it is read, and nothing in it changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support import tiny_run

from llamax.config.schema import CheckpointConfig, Config
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import CheckpointError, LlamaxError
from llamax.train import train


def steps_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def run(tmp_path: Path) -> Config:
    """A run of four steps, all of which are saved."""
    (tmp_path / "data").mkdir()
    config = tiny_run.config(tiny_run.make_dataset(tmp_path / "data"), tmp_path / "first")
    config = replace(config, run=replace(config.run, steps=4))
    train(config, Rendezvous())
    return config


def resumed(run: Config, folder: Path, resume: Path, steps: int = 6) -> Config:
    """The run in another folder, where only the newest checkpoint is kept."""
    return replace(
        run,
        run=replace(run.run, folder=str(folder), steps=steps),
        checkpoint=CheckpointConfig(every=1, keep=1, resume=str(resume)),
    )


@pytest.mark.parametrize("named", ["a step", "a run", "a link to a step", "a link to a run"])
def test_the_other_run_stays_as_it_is(run: Config, tmp_path: Path, named: str) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    resume = first / "checkpoints" / "step-00000004" if "step" in named else first
    if "link" in named:
        (tmp_path / "link").symlink_to(resume)
        resume = tmp_path / "link"
    before = content(first)
    train(resumed(run, second, resume), Rendezvous())
    assert content(first) == before
    assert steps_of(second) == ["step-00000006"]
    assert [record["step"] for record in tiny_run.log_of(second)] == [5, 6]


def test_an_earlier_step_of_the_other_run_is_the_one_that_goes_on(
    run: Config, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    before = content(first)
    train(resumed(run, second, first / "checkpoints/step-00000002", 4), Rendezvous())
    assert content(first) == before
    assert tiny_run.hashes(second, 4) == tiny_run.hashes(first, 4)


def test_a_step_that_leads_to_another_run_is_read_and_never_removed(
    run: Config, tmp_path: Path
) -> None:
    """As after a run was begun with links to checkpoints of another one."""
    first, second = tmp_path / "first", tmp_path / "second"
    (second / "checkpoints").mkdir(parents=True)
    for step in ("step-00000003", "step-00000004"):
        (second / "checkpoints" / step).symlink_to(first / "checkpoints" / step)
    before = content(first)
    auto = replace(resumed(run, second, first), checkpoint=CheckpointConfig(every=1, keep=1))
    train(auto, Rendezvous())
    assert content(first) == before
    assert steps_of(second) == ["step-00000006"]
    assert [record["step"] for record in tiny_run.log_of(second)] == [5, 6]


def test_a_folder_without_a_checkpoint_is_one_line(run: Config, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    unfinished = tmp_path / "first/checkpoints/step-00000004"
    (unfinished / "done").unlink()
    for folder, words in (
        (tmp_path / "missing", "there is no checkpoint folder"),
        (tmp_path / "empty", "no complete checkpoint in"),
        (tmp_path / "loop", "there is no checkpoint folder"),
        (tmp_path / "data", "no complete checkpoint in"),
        (unfinished, "has no file 'done'"),
    ):
        with pytest.raises(CheckpointError, match=words):
            train(resumed(run, tmp_path / "second", folder), Rendezvous())
    assert not (tmp_path / "second").exists()
    other = replace(run, model=replace(run.model, num_hidden_layers=3))
    with pytest.raises(LlamaxError, match="num_hidden_layers"):
        train(resumed(other, tmp_path / "second", tmp_path / "first"), Rendezvous())
