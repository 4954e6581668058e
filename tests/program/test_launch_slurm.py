"""What a job gets of a real Slurm, from a login shell and from inside an allocation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import slurm

LAUNCH = [sys.executable, "-m", "llamax", "launch", "--on", "slurm"]
JOB = """
name = "shares"
recipe = "{recipe}"
instance = "{instance}"
ranks_per_node = {ranks}
venv = "{folder}/venv"
[storage]
mount = "{folder}"
[overrides]
run.backend = "{backend}"
data.path = "tokens"
run.folder = "run"
[prepare]
inputs = ["text"]
tokenizer = "tokenizer.model"
workers = 32
"""
GPU = {"recipe": "llama3.2-1b", "instance": "p5.48xlarge", "ranks": "8", "backend": "cuda"}
LOCAL = {"recipe": "demo", "instance": "local", "ranks": "2", "backend": "cpu"}
# Stands for torchrun and python3 of the job: what the task has.
REPORT = """#!/bin/bash
echo "gpus=${CUDA_VISIBLE_DEVICES-none} cores=$(taskset --cpu-list --pid $$ | sed 's/.*: //')"
scontrol show step "$SLURM_JOB_ID.$SLURM_STEP_ID" | grep -o "TRES=.*"
"""


@pytest.fixture(scope="module")
def pretended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """16 CPUs, 8 GPUs, and 4096 MiB for a job that asks for no memory."""
    if reason := slurm.missing():
        pytest.skip(reason)
    with slurm.cluster(tmp_path_factory.mktemp("pretended"), pretended=True) as environ:
        yield environ


@pytest.fixture(scope="module")
def bound(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The CPUs of this machine, to which tasks are bound."""
    if reason := slurm.missing():
        pytest.skip(reason)
    with slurm.cluster(tmp_path_factory.mktemp("bound")) as environ:
        yield environ


def write(folder: Path, values: dict[str, str], more: str = "") -> Path:
    job = folder / "job.toml"
    job.write_text(JOB.format(folder=folder, **values) + more)
    programs = folder / "venv" / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    for name in ("torchrun", "python3"):
        (programs / name).write_text(REPORT)
        (programs / name).chmod(0o755)
    return job


def report(environ: dict[str, str], folder: Path, command: list[str]) -> str:
    """The log of the one job that a command submits."""
    done = subprocess.run(command, env=environ, text=True, capture_output=True, check=False)
    assert "Submitted batch job" in done.stdout, done.stdout + done.stderr
    limit = time.monotonic() + 300
    queue = ["squeue", "--noheader"]
    while left := subprocess.run(queue, env=environ, capture_output=True).stdout:
        assert time.monotonic() < limit, left
        time.sleep(0.25)
    (log,) = folder.glob("shares*.log")
    return log.read_text()


@pytest.mark.parametrize(
    "shell",
    [
        [],
        ["salloc", "-n1", "-c2", "--mem-per-cpu=1000"],
        ["salloc", "-n1", "--gpus-per-node=1", "--mem=1000"],
        ["srun", "-n1", "--gpus-per-node=2", "--mem=1000"],
        ["salloc", "-n1", "--gpus-per-task=1", "--cpus-per-gpu=1", "--mem-per-gpu=500"],
    ],
    ids=" ".join,
)
def test_a_step_has_the_whole_node(
    pretended: dict[str, str], tmp_path: Path, shell: list[str]
) -> None:
    job = write(tmp_path, GPU)
    log = report(pretended, tmp_path, [*shell, *LAUNCH, "--job", str(job)])
    assert "gpus=0,1,2,3,4,5,6,7 " in log
    assert "TRES=cpu=16,mem=62.50G,node=1" in log


def test_a_script_submitted_by_hand_keeps_to_its_own_allocation(
    pretended: dict[str, str], tmp_path: Path
) -> None:
    job = write(tmp_path, GPU)
    script = tmp_path / "script.sh"
    rendered = [*LAUNCH, "--job", str(job), "--render"]
    script.write_text(subprocess.run(rendered, text=True, capture_output=True, check=True).stdout)
    shell = ["salloc", "-n1", "-c2", "--mem-per-cpu=1000", "--gpus-per-node=1"]
    log = report(pretended, tmp_path, [*shell, "sbatch", str(script)])
    assert "gpus=0,1,2,3,4,5,6,7 " in log
    assert "TRES=cpu=16,mem=62.50G,node=1" in log


def test_gpus_that_slurm_does_not_manage_are_not_asked_for(
    bound: dict[str, str], tmp_path: Path
) -> None:
    """This Slurm has no GPUs and refuses jobs that ask for some."""
    asks = [*LAUNCH, "--job", str(write(tmp_path, GPU))]
    refused = subprocess.run(asks, env=bound, text=True, capture_output=True, check=False)
    assert refused.returncode == 1
    assert "Invalid generic resource (gres) specification" in refused.stderr
    job = write(tmp_path, GPU, "[slurm]\ngres = false\n")
    assert "gpus=none " in report(bound, tmp_path, [*LAUNCH, "--job", str(job)])


@pytest.mark.parametrize("phase", ["prepare", "train"])
def test_a_local_job_has_all_cores_of_a_node(
    bound: dict[str, str], tmp_path: Path, phase: str
) -> None:
    job = write(tmp_path, LOCAL)
    log = report(bound, tmp_path, [*LAUNCH, "--job", str(job), "--phase", phase])
    cores = len(os.sched_getaffinity(0))
    assert f"TRES=cpu={cores}," in log
    assert log.partition("cores=")[2].split()[0] != "0" or cores == 1


def test_a_local_job_may_share_a_node(pretended: dict[str, str], tmp_path: Path) -> None:
    job = write(tmp_path, LOCAL, "[slurm]\ncpus = 3\nmemory_gib = 2\n")
    log = report(pretended, tmp_path, [*LAUNCH, "--job", str(job)])
    assert "TRES=cpu=3,mem=2G,node=1" in log


@pytest.mark.parametrize("action", ["stop", "status", "logs", "utilization"])
def test_actions_on_a_job_that_does_not_run_end_well(
    bound: dict[str, str], tmp_path: Path, action: str
) -> None:
    command = [*LAUNCH, "--job", str(write(tmp_path, LOCAL)), "--action", action]
    done = subprocess.run(command, env=bound, text=True, capture_output=True, check=False)
    wanted = {"logs": "no log yet", "utilization": "shares is not running"}
    assert (done.returncode, done.stdout.strip()) == (
        0,
        wanted.get(action, "shares is not in the queue"),
    )


def test_actions_on_a_job_that_waits(bound: dict[str, str], tmp_path: Path) -> None:
    job = write(tmp_path, LOCAL)
    script = tmp_path / "script.sh"
    command = [*LAUNCH, "--job", str(job)]

    def act(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *options], env=bound, text=True, capture_output=True)

    script.write_text(act("--render").stdout)
    subprocess.run(["sbatch", "--hold", str(script)], env=bound, check=True)
    (tmp_path / "shares-1.log").write_text("x")
    assert " PENDING " in act("--action", "status").stdout
    done = act("--action", "clean")
    assert done.returncode == 2
    assert "shares is in the queue as job" in done.stderr
    done = act("--action", "stop")
    assert (done.returncode, done.stdout) == (0, "shares ends; if it runs, it saves before\n")
    assert "shares is not in the queue" in act("--action", "status").stdout
    assert act("--action", "clean").returncode == 0
    assert not (tmp_path / "shares-1.log").exists()


KILLED = """
import os, signal, subprocess, sys
from pathlib import Path
from support import slurm
with slurm.cluster(Path(sys.argv[1])) as environ:
    subprocess.run(["sbatch", "--output=/dev/null", "--wrap=sleep 1000"], env=environ, check=True)
    state = ["squeue", "--noheader", "--format=%T"]
    while b"RUNNING" not in subprocess.run(state, env=environ, capture_output=True).stdout:
        pass
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_daemon_or_job_outlives_a_killed_test(tmp_path: Path) -> None:
    if reason := slurm.missing():
        pytest.skip(reason)
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "cluster")]
    done = subprocess.run(command, env=environ, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    marked = f"SLURM_CONF={tmp_path}/cluster/slurm.conf".encode()
    limit = time.monotonic() + 300
    while left := [path for path in Path("/proc").glob("[0-9]*/environ") if has(path, marked)]:
        assert time.monotonic() < limit, left
        time.sleep(0.1)


def has(environ: Path, variable: bytes) -> bool:
    try:
        return variable in environ.read_bytes().split(b"\0")
    except OSError:  # the process ended
        return False
