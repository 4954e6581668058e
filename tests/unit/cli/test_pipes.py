"""A pipe in the place of a file of a run, checkpoint or dataset is one line, and no wait."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import support.checkpoints as worlds
from support.run_folders import make_run
from support.tiny_run import make_dataset

from llamax.cli import inspect, report, watch
from llamax.data.dataset import open_dataset
from llamax.runtime.errors import LlamaxError
from llamax.runtime.process import run_main
from llamax.tools.monitor import plot

pytestmark = pytest.mark.timeout(60)  # a pipe would wait for its other end


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def test_a_log_that_is_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", 3)
    pipe(run / "metrics.jsonl")
    for main, argv in (
        (watch.main, [str(run), "--once"]),
        (report.main, [str(run), "--out", str(tmp_path / "r.html")]),
    ):
        assert run_main(main, argv) == 2
        assert "metrics.jsonl is not a regular file" in capsys.readouterr().err
    with pytest.raises(LlamaxError, match=r"metrics\.jsonl is not a regular file"):
        plot.read_runs([run])


def test_a_report_of_devices_that_is_a_pipe_counts_for_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", 3)
    pipe(run / "neuron-monitor-host.json")
    assert run_main(watch.main, [str(run), "--once"]) == 0
    assert "step" in capsys.readouterr().out


def test_a_file_of_a_checkpoint_that_is_a_pipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = worlds.llama()
    saved = worlds.save(
        tmp_path / "saved", model, worlds.world(model, 1, 1, True, worlds.wholes(model))
    )
    for path in sorted(saved.iterdir()):
        folder = shutil.copytree(saved, tmp_path / path.name / saved.name)
        pipe(folder / path.name)
        assert run_main(inspect.main, [str(folder), "--verify"]) == 2, path.name
        said = capsys.readouterr().err
        assert said.startswith("llamax: "), said
        assert path.name in said


def test_a_file_of_a_dataset_that_is_a_pipe(tmp_path: Path) -> None:
    for name in ("train.tokens", "validation.tokens", "dataset.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        make_dataset(folder)
        pipe(folder / name)
        with pytest.raises(LlamaxError, match=folder.name):
            open_dataset(folder)
