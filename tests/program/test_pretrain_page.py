"""The pretraining page: each of its commands runs, on the cluster's launchers as text."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llamax.cli.launch import main
from llamax.launch import jobfile
from llamax.launch.checks import problems
from llamax.launch.render import ACTIONS, PHASES

PAGE = (Path(__file__).resolve().parents[2] / "launch" / "PRETRAIN.md").read_text()
FINETUNE = (Path(__file__).resolve().parents[2] / "launch" / "FINETUNE.md").read_text()
CLUSTER, LAPTOP = PAGE.split("## On a laptop, for real")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "job.toml").write_text(blocks(CLUSTER, "toml")[0])
    return tmp_path


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A script in which ``llamax`` and ``python3`` are these."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": path},
        text=True,
        capture_output=True,
        check=False,
    )


def commands(program: str) -> list[str]:
    lines = "".join(blocks(CLUSTER, "sh")).splitlines()
    return [line for line in lines if line.startswith(program)]


def test_the_job_is_right_for_every_launcher_it_names(folder: Path) -> None:
    job = jobfile.load(folder / "job.toml")
    for launcher in ("torchrun", "mpirun", "slurm", "k8s"):
        for phase in PHASES[launcher]:
            several = (launcher, phase) == ("torchrun", "cluster")  # the page has 4 nodes
            message = "nodes=4 but --on torchrun makes one instance; use --on slurm or k8s"
            assert problems(job, launcher, phase) == ([message] if several else [])
    assert job.prepare.workers == 32


def test_every_launch_of_the_page_renders(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    lines = [line.partition(" > ")[0] for line in commands("llamax launch")]
    assert len(lines) > 12
    for line in lines:
        assert main([*shlex.split(line)[2:], "--render"]) == 0
        assert capsys.readouterr().out.count("\n") > 2, line
    told = {option: set() for option in ("--phase", "--action")}  # type: dict[str, set[str]]
    for line in commands("llamax launch"):
        words = shlex.split(line)
        for option in told:
            told[option] |= {words[words.index(option) + 1]} if option in words else set()
    assert told["--phase"] | {"train"} == set(PHASES["k8s"]), "a phase that the page leaves out"
    assert told["--action"] | {"start"} == set(ACTIONS), "an action that the page leaves out"


def test_every_launch_of_the_page_on_fine_tuning_renders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.toml").write_text(blocks(FINETUNE, "toml")[0])
    lines = [
        line
        for line in "".join(blocks(FINETUNE, "sh")).splitlines()
        if line.startswith("llamax launch")
    ]
    assert len(lines) > 9
    for line in lines:
        assert main([*shlex.split(line)[2:], "--render"]) == 0, line
        assert capsys.readouterr().out.count("\n") > 2, line
    assert lines[0].endswith("--on sagemaker --phase cluster")  # looks at quotas first
    assert lines[-2].endswith("--phase cluster --action clean")


def test_names_on_the_page_are_those_of_the_manifests(folder: Path) -> None:
    job = jobfile.load(folder / "job.toml")
    for line in commands("kubectl"):
        assert f"{job.name}-shell" in line or f"{job.name}-tensorboard" in line
    (push,) = commands("docker")
    assert push.split()[-1] == job.image


def test_the_plan_and_the_doctor_answer(folder: Path) -> None:
    done = run("llamax plan --config llama2-7b --nodes 4 && llamax doctor --job job.toml", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unknown  devices" in done.stdout


def test_the_laptop_part_runs(tmp_path: Path) -> None:
    done = run(blocks(LAPTOP, "sh")[0], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 30/30" in done.stdout + done.stderr
    assert (tmp_path / "laptop/run/checkpoints/step-00000030/done").exists()
    assert "0 errors" in done.stdout


def test_every_launcher_is_in_the_table() -> None:
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE) == list(PHASES)
