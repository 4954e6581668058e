"""Jobs that really run: under torchrun, Open MPI, MPICH and Slurm; stopped and resumed."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import slurm
from support.tiny_run import free_port

from llamax.data.dataset import open_dataset

LLAMAX = [sys.executable, "-m", "llamax"]
JOB = """
name = "small"
recipe = "demo"
nodes = {nodes}
instance = "local"
ranks_per_node = {ranks}
port = {port}
[storage]
mount = "{folder}"
[overrides]
data = {{ path = "data", sequence_length = 32, global_batch = 4, micro_batch = 1 }}
run = {{ folder = "run", steps = {steps}, log_every = 1, validate_every = 0, tensorboard = false }}
model = {{ hidden_size = 32, intermediate_size = 48, num_hidden_layers = 2, vocab_size = 512 }}
optim.warmup_steps = 1
checkpoint.every = 0
[prepare]
inputs = ["text"]
tokenizer = "tokenizer"
workers = 2
"""


def needs(*programs: str, package: str) -> pytest.MarkDecorator:
    here = all(map(shutil.which, programs))
    return pytest.mark.skipif(not here, reason=f"no {programs[0]}: apt-get install {package}")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a tokenizer, and the tokens that the job's own prepare phase made."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "text").mkdir()
    shutil.copy(argparse.__file__, folder / "text" / "a.txt")
    train = ["prepare", "text", "--train-tokenizer", "512", "--out", "first"]
    subprocess.run([*LLAMAX, *train], cwd=folder, check=True, capture_output=True)
    (folder / "tokenizer").mkdir()
    shutil.copy(folder / "first" / "tokenizer.model", folder / "tokenizer")
    add_stray_modules(folder)
    launch(write(folder), "torchrun", "--phase", "prepare")
    return folder


@pytest.fixture
def temporary() -> Iterator[Path]:
    """The folder of temporary files of a job, in which nothing may be left; its path is short."""
    with tempfile.TemporaryDirectory(prefix="l", dir="/tmp") as folder:
        yield Path(folder)
        limit = time.monotonic() + 300
        while left := [path.name for path in Path(folder).glob("tmp.*")]:
            assert time.monotonic() < limit, left
            time.sleep(0.1)


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared / "data", tmp_path / "data")
    return tmp_path


def add_stray_modules(folder: Path) -> None:
    """Put modules that end a job into its working folder; Python 3.10 would import them."""
    if sys.version_info >= (3, 11):
        for name in ("random", "torch", "llamax", "json"):
            (folder / f"{name}.py").write_text("raise SystemExit('a stray module was imported')")


def test_a_job_prepares_instruction_data(prepared: Path, tmp_path: Path) -> None:
    rows = [{"q": f"What is {n}?", "best answer": f'It\'s "{n}".'} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held out.jsonl").write_text(json.dumps(rows[0]) + "\n")
    shutil.copytree(prepared / "tokenizer", tmp_path / "tokenizer")
    text = write(tmp_path).read_text().replace('inputs = ["text"]', 'inputs = ["rows.jsonl"]')
    text += """template = "usr-bot"
system = '''Don't "$(touch pwned)".
Be `brief`.'''
fields = { instruction = "q", answer = "best answer" }
validation_files = ["held out.jsonl"]
"""
    (tmp_path / "job.toml").write_text(text)
    launch(tmp_path / "job.toml", "torchrun", "--phase", "prepare")
    record = json.loads((tmp_path / "data" / "dataset.json").read_text())["prompt"]
    assert record["system"] == 'Don\'t "$(touch pwned)".\nBe `brief`.'
    assert record["fields"] == {"instruction": "q", "answer": "best answer"}
    made = open_dataset(tmp_path / "data")
    assert made.train.header.documents == 20
    assert made.validation is not None
    assert made.validation.header.documents == 1
    assert not (tmp_path / "pwned").exists()


def write(folder: Path, more: str = "", nodes: int = 1, ranks: int = 2, steps: int = 3) -> Path:
    path = folder / "job.toml"
    values = {"folder": folder, "nodes": nodes, "ranks": ranks, "steps": steps}
    path.write_text(JOB.format(**values, port=free_port()) + more)
    return path


def launch(job: Path, launcher: str, *options: str, **more: object) -> str:
    """What ``llamax launch`` said; it must end well."""
    command = [*LLAMAX, "launch", "--job", str(job), "--on", launcher, *options]
    done = subprocess.run(command, text=True, capture_output=True, timeout=300, **more)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout + done.stderr)


def losses(folder: Path) -> list[float]:
    """What the run logged, a loss a step."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def trained(folder: Path, steps: int = 3) -> None:
    assert len(losses(folder)) == steps
    done = folder / "run" / "checkpoints" / f"step-{steps:08}" / "done"
    assert done.exists()


@pytest.fixture(scope="session")
def expected(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses under torchrun, which every launcher must meet."""
    folder = tmp_path_factory.mktemp("expected")
    shutil.copytree(prepared / "data", folder / "data")
    add_stray_modules(folder)
    said = launch(write(folder), "torchrun")
    assert "[rank 0] step 3/3" in said
    trained(folder)
    logs = sorted((folder / "run" / "logs" / "train").rglob("*/stderr.log"))
    assert [path.parent.name for path in logs] == ["0", "1"]
    assert "done in" in logs[0].read_text()
    return losses(folder)


def test_torchrun_on_two_nodes_of_one_machine(folder: Path, expected: list[float]) -> None:
    """Each node's own command, given at the same time; ranks rendezvous at the master's port."""
    job = write(folder, '[torchrun]\nmaster = "127.0.0.1"\n', nodes=2, ranks=1)
    lines = launch(job, "torchrun", "--render").splitlines()
    script = [line for line in lines if not line.startswith(("(umask 022 && set", "if [[ -f $pid"))]
    text = "\n".join(lines).replace("$(uname -n)", "node$1")
    assert len(script) < len(lines)
    nodes = [
        subprocess.Popen(["bash", "-c", text, "x", str(node)], env=with_programs())
        for node in range(2)
    ]
    assert [node.wait(300) for node in nodes] == [0, 0]
    assert losses(folder) == expected
    assert sorted(path.name for path in (folder / "run/logs/train").iterdir()) == ["node0", "node1"]


def with_programs() -> dict[str, str]:
    """The environment with this Python's programs first, as ``llamax launch`` sets it."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@needs("mpirun", package="openmpi-bin")
@pytest.mark.parametrize("per", ["node", "core"])
def test_mpirun_trains(folder: Path, temporary: Path, expected: list[float], per: str) -> None:
    environ = {**os.environ, "TMPDIR": str(temporary)}
    add_stray_modules(folder)
    job = write(folder, f'[mpirun]\nper = "{per}"\n')
    launch(job, "mpirun", env=environ)
    trained(folder)
    assert losses(folder) == expected
    assert "done in" in launch(job, "mpirun", "--action", "logs")


RSH = """#!/bin/bash
# Stands for ssh: the command runs on this machine, whatever the host is called.
echo "$1" >>{folder}/hosts-called
shift
exec bash -c "$*"
"""
HOSTS = {
    "slots": "localhost slots=1\nanother slots=1\n",
    "more slots than ranks": "localhost slots=8 max-slots=9\nanother slots=8\n",
    "comments": "# all\n\nlocalhost # the first\n  another\n",
    "users": "root@localhost\nroot@another slots=4\n",
    "repeated": "localhost\nanother\nanother\n",
    "addresses": "127.0.0.1\n10.99.0.1\n",
}


@needs("mpirun", package="openmpi-bin")
@pytest.mark.parametrize(
    ("form", "per"), [*((form, "core") for form in HOSTS), ("comments", "node")]
)
def test_mpirun_trains_on_the_hosts_of_a_file(
    folder: Path, temporary: Path, expected: list[float], form: str, per: str
) -> None:
    """A rank on each of two hosts, which are both this machine."""
    (folder / "rsh").write_text(RSH.format(folder=folder))
    (folder / "rsh").chmod(0o755)
    (folder / "hosts").write_text(HOSTS[form])
    more = f'[mpirun]\nhostfile = "hosts"\nper = "{per}"\n'
    environ = {**os.environ, "TMPDIR": str(temporary)}
    environ["OMPI_MCA_plm_rsh_agent"] = str(folder / "rsh")
    launch(write(folder, more, nodes=2, ranks=1), "mpirun", env=environ)
    called = (folder / "hosts-called").read_text().split()
    assert [name.removeprefix("root@") in HOSTS[form] for name in called] == [True]
    trained(folder)
    assert losses(folder) == expected


@needs("mpiexec.hydra", package="mpich")
def test_hydra_starts_ranks(folder: Path, expected: list[float]) -> None:
    arguments = launch(write(folder), "mpirun", "--render").partition("program=(")[2]
    words = arguments.partition(")")[0].split()
    command = ["mpiexec.hydra", "-np", "2", sys.executable, *words]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
    assert losses(folder) == expected


def test_a_run_is_found_stopped_and_gone_on_with(folder: Path, temporary: Path) -> None:
    job = write(folder, steps=100_000)
    assert "no process of" in launch(job, "torchrun", "--action", "status")
    command = [*LLAMAX, "launch", "--job", str(job), "--on", "torchrun"]
    with (folder / "said").open("w") as said:
        environ = {**os.environ, "TMPDIR": str(temporary)}
        run = subprocess.Popen(command, stderr=said, stdout=said, env=environ)
    try:
        metrics = folder / "run" / "metrics.jsonl"
        while run.poll() is None and not (metrics.exists() and metrics.read_text()):
            time.sleep(0.2)
        assert run.poll() is None, (folder / "said").read_text()
        assert "llamax.train" in launch(job, "torchrun", "--action", "status")
        twice = subprocess.run(command, text=True, capture_output=True, check=False)
        assert twice.returncode == 2
        assert "train of run already runs here as process" in twice.stderr
        launch(job, "torchrun", "--action", "stop")
        run.wait(timeout=300)
    finally:
        run.terminate()
    saved = [path.parent.name for path in (folder / "run" / "checkpoints").glob("*/done")]
    assert len(saved) == 1
    assert int(saved[0].removeprefix("step-")) < 100_000


@needs("mpirun", package="openmpi-bin")
@pytest.mark.parametrize("per", ["node", "core"])
@pytest.mark.parametrize("how", ["stop", "SIGTERM", "mpirun SIGTERM"])
def test_mpirun_is_stopped_past_its_own_patience(folder: Path, per: str, how: str) -> None:
    """Open MPI 4 kills a second after SIGTERM, Open MPI 5 at once: both have been run by this."""
    job = write(folder, f'[mpirun]\nper = "{per}"\n', steps=5_000)
    command = [*LLAMAX, "launch", "--job", str(job), "--on", "mpirun"]
    with (folder / "said").open("w") as said:
        run = subprocess.Popen(command, stderr=said, stdout=said)
    metrics = folder / "run" / "metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.2)
    assert run.poll() is None, (folder / "said").read_text()
    (process,) = (folder / "run" / "logs").glob("train-*.pid")
    pid = process.read_text().split()[0]
    if how == "stop":
        assert "llamax.train" in launch(job, "mpirun", "--action", "status")
        launch(job, "mpirun", "--action", "stop")
    elif how == "SIGTERM":
        os.kill(int(pid), signal.SIGTERM)
    else:
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(child), signal.SIGTERM)
    code = run.wait(300)
    text = (folder / "said").read_text()
    assert len(list((folder / "run" / "checkpoints").glob("step-*/done"))) == 1, text
    assert "is saved; start again to go on" in text
    if per == "core":  # torchrun has a code of its own
        assert code == 75


# ---- Slurm


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    if reason := slurm.missing():
        pytest.skip(reason)
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as environ:
        yield environ


def test_sbatch_takes_the_scripts(folder: Path, cluster: dict[str, str], tmp_path: Path) -> None:
    more = '[slurm]\npartition = "main"\ntime_limit = "1:00:00"\n'
    for phase in ("prepare", "precompile", "train"):
        script = tmp_path / f"{phase}.sh"
        script.write_text(launch(write(folder, more), "slurm", "--phase", phase, "--render"))
        command = ["sbatch", "--test-only", str(script)]
        done = subprocess.run(command, env=cluster, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "to start at" in done.stderr


@pytest.fixture
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    if reason := slurm.missing():
        pytest.skip(reason)
    with slurm.cluster(tmp_path_factory.mktemp("slurm"), nodes=2) as environ:
        yield environ


def test_slurm_trains_on_two_nodes(
    folder: Path, temporary: Path, two_nodes: dict[str, str], expected: list[float]
) -> None:
    """srun starts a torchrun on each node; their ranks meet at the first one's port."""
    job = write(folder, nodes=2, ranks=1)
    launch(job, "slurm", env={**two_nodes, "TMPDIR": str(temporary)})
    wait_until_gone(job, two_nodes)
    (log,) = folder.glob("small-*.log")
    assert losses(folder) == expected, log.read_text()
    logs = list((folder / "run" / "logs" / "train").rglob("0/stderr.log"))
    assert len(logs) == 2, "a torchrun on each node"


def wait_until_gone(job: Path, environ: dict[str, str]) -> None:
    limit = time.monotonic() + 300
    while True:
        state = launch(job, "slurm", "--action", "status", env=environ)
        if not any(name in state for name in ("PENDING", "RUNNING", "COMPLETING")):
            return
        assert time.monotonic() < limit, state
        time.sleep(0.5)


def test_slurm_trains(
    folder: Path, temporary: Path, cluster: dict[str, str], expected: list[float]
) -> None:
    job = write(folder)
    add_stray_modules(folder)
    environ = {**cluster, "TMPDIR": str(temporary)}
    assert "Submitted batch job" in launch(job, "slurm", env=environ)
    wait_until_gone(job, cluster)
    (log,) = folder.glob("small-*.log")
    assert losses(folder) == expected, log.read_text()
