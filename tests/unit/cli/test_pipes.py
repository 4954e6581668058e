"""A pipe in the place of a file of a run, checkpoint or dataset is one line, and no wait."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import support.checkpoints as worlds
from support.adapters import base_folder
from support.instruction import llama2_tokenizer
from support.run_folders import make_run
from support.tiny_run import make_dataset

from llamax.cli import (
    evaluate,
    generate,
    import_,
    inspect,
    launch,
    merge,
    plan,
    prepare,
    report,
    serve,
    shard,
    watch,
)
from llamax.data.dataset import open_dataset
from llamax.runtime.errors import LlamaxError
from llamax.runtime.process import run_main
from llamax.tools.monitor import plot

pytestmark = pytest.mark.timeout(300)  # a pipe would wait for its other end


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home") / "model"
    base_folder(folder, worlds.llama(vocabulary=640))
    llama2_tokenizer(folder)
    return folder


OPTIONS = {
    "prompts": [generate, "MODEL", "--prompts-file", "PIPE"],
    "rows": [generate, "MODEL", "--template", "dolly", "--prompts-file", "PIPE.jsonl"],
    "template": [generate, "MODEL", "--prompt", "x", "--template", "PIPE"],
    "tokenizer": [generate, "MODEL", "--prompt", "x", "--tokenizer", "PIPE"],
    "model": [generate, "PIPE", "--prompt", "x"],
    "adapters": [merge, "MODEL", "PIPE", "--out", "OUT"],
    "config": [plan, "--config", "PIPE"],
    "machine": [plan, "--config", "demo", "--instance", "PIPE.toml"],
    "job": [launch, "--job", "PIPE", "--on", "slurm"],
    "keys": [serve, "MODEL", "--api-key-file", "PIPE", "--port", "0"],
    "chat": [serve, "MODEL", "--template", "PIPE", "--port", "0"],
    "text": [prepare, "PIPE", "--tokenizer", "MODEL", "--out", "OUT"],
    "its tokenizer": [prepare, "TEXT", "--tokenizer", "PIPE", "--out", "OUT"],
    "questions": [prepare, "PIPE.csv", "--template", "dolly", "--tokenizer", "MODEL", "--out=OUT"],
    "its template": [
        prepare,
        "ROWS.jsonl",
        "--template",
        "PIPE",
        "--tokenizer",
        "MODEL",
        "--out=OUT",
    ],
    "data": [evaluate, "MODEL", "--data", "PIPE"],
    "checkpoint": [import_, "PIPE", "--out", "OUT"],
    "weights": [shard, "PIPE", "--out", "OUT"],
    "run": [watch, "PIPE", "--once"],
    "inspected": [inspect, "PIPE"],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_input_that_is_a_pipe_without_a_writer_is_one_line(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "TEXT").write_text("one two\n")
    (tmp_path / "ROWS.jsonl").write_text('{"instruction": "one", "answer": "two"}\n')
    for each in ("PIPE", "PIPE.jsonl", "PIPE.toml", "PIPE.csv"):
        pipe(tmp_path / each)
    command, *words = OPTIONS[name]
    names = ("PIPE", "TEXT", "ROWS", "OUT")
    assert not isinstance(command, str)
    argv = [str(tmp_path / word) if word.startswith(names) else word for word in map(str, words)]
    argv = [word.replace("=OUT", f"={tmp_path}/OUT") for word in argv]
    argv = [str(model) if word == "MODEL" else word for word in argv]
    assert run_main(command.main, argv) == 2
    (*_, line) = capsys.readouterr().err.splitlines()
    assert "PIPE" in line


def test_prompts_come_from_another_program(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with subprocess.Popen(["printf", "import os\nimport"], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        argv = [str(model), "--prompts-file", f"/dev/fd/{other.stdout.fileno()}"]
        assert run_main(generate.main, [*argv, "--max-new-tokens", "1", "--temperature", "0"]) == 0
    assert "import os" in capsys.readouterr().out


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
