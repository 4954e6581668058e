"""``llamax launch``: options and exit codes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.launch_jobs import tables

from llamax.cli import launch
from llamax.cli.launch import main
from llamax.config.toml import to_toml
from llamax.launch import sagemaker_checks
from llamax.runtime.errors import BackendError, ConfigError

# ---- the command


def write(folder: Path, **changes: Any) -> str:
    """A job file in ``folder``."""

    def lines(table: dict[str, Any], prefix: str = "") -> list[str]:
        flat = [
            f"{k} = {to_toml(tuple(v) if isinstance(v, list) else v)}"
            for k, v in table.items()
            if not isinstance(v, dict)
        ]
        for key, value in table.items():
            if isinstance(value, dict):
                flat += [f"[{prefix}{key}]", *lines(value, f"{prefix}{key}.")]
        return flat

    path = folder / "job.toml"
    path.write_text("\n".join(lines(tables(**changes))) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--on", "torchrn"], "--on torchrn: unknown here; did you mean torchrun?"),
        (["--on", "Kubernetes"], "--on Kubernetes: unknown here; did you mean k8s?"),
        (["--on", "lsf"], "--on lsf: unknown here; there are torchrun, mpirun, slurm, docker, k"),
        (["--on", "slurm", "--phase", "trian"], "--phase trian: unknown here; did you mean train?"),
        (
            ["--on", "mpirun", "--phase", "serve"],
            "--phase serve: --on mpirun has prepare, precompile, train, tensorboard; use one of "
            "these, or --on docker, k8s or sagemaker",
        ),
        (
            ["--on", "slurm", "--phase", "shell"],
            "--phase shell: --on slurm has cluster, prepare, precompile, train, tensorboard; use "
            "one of these, or --on k8s",
        ),
        (["--on", "slurm", "--action", "kill"], "--action kill: unknown here; there are start, st"),
        (
            ["--on", "slurm", "--phase", "tensorboard", "--action", "stop"],
            "--action stop: --phase tensorboard runs in the foreground; press Ctrl-C",
        ),
        (["--on", "torchrun", "--node", "4"], "--node=4 is out of range; use 0 to 3"),
        (["--on", "torchrun", "--node", "-1"], "--node=-1 is out of range; use 0 to 3"),
        (["--on", "torchrun", "--node", "4", "--render"], "--node=4 is out of range; use 0 to 3"),
        (["--on", "k8s", "--node", "1"], "--node=1 is for starting precompile or train with"),
        (
            ["--on", "torchrun", "--phase", "prepare", "--node", "1"],
            "--node=1 is for starting prec",
        ),
        (["--on", "torchrun", "--action", "logs", "--node", "1"], "--node=1 is for"),
        (["--on", "torchrun"], "--node is missing: 4 nodes each run this command with their own"),
    ],
)
def test_options_are_checked(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        main(["--job", write(tmp_path, nodes=4), *options])


def test_a_launcher_that_is_not_here_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendError, match="kubectl is not installed here; install it, or print"):
        main(["--job", write(tmp_path), "--on", "k8s"])
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(
        BackendError,
        match=r"the SageMaker SDK is not installed here; pip install 'sagemaker>=3,<4', or print",
    ):
        main(["--job", write(tmp_path), "--on", "sagemaker"])


@pytest.mark.parametrize(
    ("launcher", "what", "program"),
    [
        ("slurm", "status", "squeue"),
        ("slurm", "clean", "squeue"),
        ("k8s", "stop", "kubectl"),
        ("docker", "stop", "docker"),
        ("sagemaker", "logs", "aws"),
    ],
)
def test_the_program_of_an_action_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str, what: str, program: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    phase = "serve" if launcher == "docker" else "train"
    with pytest.raises(BackendError, match=f"^{program} is not installed here; install it, or pr"):
        main(["--job", write(tmp_path), "--on", launcher, "--phase", phase, "--action", what])


def test_another_sdk_than_the_jobs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, sagemaker__sdk=2)
    monkeypatch.setattr(sagemaker_checks, "installed", lambda package: "3.27.0")
    with pytest.raises(
        BackendError,
        match=r"the SageMaker SDK found is 3.27.0, but the job is for version 2; set sagemaker.sdk",
    ):
        main(["--job", path, "--on", "sagemaker"])


def test_the_program_ends_with_one_line_and_code_2(tmp_path: Path) -> None:
    path = write(tmp_path, storage__claim="")
    command = [sys.executable, "-m", "llamax", "launch", "--job", path, "--on", "k8s", "--render"]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        f"llamax: {path}: storage.claim is empty; set it to the Persistent"
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("phase", ["prepare", "tensorboard"])
def test_a_phase_of_one_node_needs_no_number(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], phase: str
) -> None:
    job = write(tmp_path, nodes=4, storage={"mount": str(tmp_path / "none")})
    assert main(["--job", job, "--on", "torchrun", "--phase", phase]) == 2
    assert f"there is no folder {tmp_path}/none on this machine" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_reaches_the_launcher_which_takes_its_time(
    tmp_path: Path, number: signal.Signals
) -> None:
    """SIGINT as a terminal sends it: to the whole group of processes."""
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    torchrun = programs / "torchrun"
    torchrun.write_text(
        '#!/bin/bash\ntrap "read -t 1 <>ready; touch saved; exit 75" TERM HUP INT\nmkfifo ready\n'
        "read -r -t 60 <>ready\n"
    )
    torchrun.chmod(0o755)
    changes: dict[str, Any] = {"instance": "local", "ranks_per_node": 2, "recipe": "demo"}
    changes |= {"storage": {"mount": str(tmp_path)}, "venv": str(tmp_path / "venv")}
    job = write(tmp_path, overrides={"run": {"folder": "run"}}, **changes)
    command = [sys.executable, "-m", "llamax", "launch", "--job", job, "--on", "torchrun"]
    started = subprocess.Popen(command, start_new_session=True)
    while not (tmp_path / "ready").exists():
        assert started.poll() is None
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(started.pid, number)
    else:
        started.send_signal(number)
    assert started.wait(300) == (130 if number == signal.SIGINT else 75)
    assert (tmp_path / "saved").exists()


def test_a_command_is_waited_for_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait without end would delay a signal that comes just before it."""
    monkeypatch.setattr(subprocess.Popen, "wait", None)
    assert launch.run_command(["sh", "-c", "exit 7"], dict(os.environ)) == 7
