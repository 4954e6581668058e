"""Scripts and manifests: no value escapes its quotes."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.launch_jobs import TRICKS, job, read_by_kubernetes

from llamax.config.hardware import load_machine, machine_names
from llamax.launch import jobfile
from llamax.launch.mpirun import FIRST_HOST
from llamax.launch.render import action, render


def test_what_can_be_planned_can_be_launched() -> None:
    assert set(jobfile.instances()) - {"local"} == set(machine_names()) - {"cpu"}
    for name in set(jobfile.instances()) - {"local"}:
        this = job(instance=name.upper())
        assert this.machine == load_machine(name)
        assert this.ranks == this.machine.ranks
        assert this.machine.devices > 0 < this.machine.host_memory_gib


# ---- quotes


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun", "slurm", "k8s"])
@pytest.mark.parametrize("phase", ["prepare", "train"])
def test_no_value_escapes_its_quotes(tmp_path: Path, launcher: str, phase: str) -> None:
    """The rendered script runs with every command replaced by one that writes its arguments."""
    this = job(
        environment={"TRICK": TRICKS},
        overrides={"data": {"path": f"/fsx/{TRICKS}"}, "run": {"folder": f"run {TRICKS}"}},
        prepare={"inputs": [TRICKS], "tokenizer": TRICKS},
        venv="" if launcher == "k8s" else f"venv {TRICKS}",
        mpirun__hostfile="" if launcher != "k8s" else "x",
    )
    text = render(this, launcher, phase)
    if launcher == "k8s":
        spec = yaml.safe_load(text)["spec"]
        spec = spec["mpiReplicaSpecs"]["Launcher"] if phase == "train" else spec
        (container,) = spec["template"]["spec"]["containers"]
        text = read_by_kubernetes(container["command"][2]).replace("/etc/mpi/hostfile", "hosts")
    (tmp_path / "hosts").write_text("localhost\n")
    (tmp_path / "said").write_text("")
    fake = tmp_path / "bin"
    fake.mkdir()
    (tmp_path / f"venv {TRICKS}" / "bin").mkdir(parents=True)
    for name in ("torchrun", "mpirun", "srun", "python3"):
        body = f'#!/bin/bash\nprintf "%s\\0" "$TRICK" "$@" >{tmp_path}/said\n'
        (fake / name).write_text(body)
        (fake / name).chmod(0o755)
    text = text.replace("cd -- /fsx/llama", f"cd -- {tmp_path}\nPATH={fake}:$PATH")
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    trick, *said = (tmp_path / "said").read_text().split("\0")
    assert trick == TRICKS
    if phase == "prepare":
        assert TRICKS in said
        assert f"--out=/fsx/{TRICKS}" in said
        assert f"--tokenizer={TRICKS}" in said
    else:
        assert f"--data.path=/fsx/{TRICKS}" in said
        assert f"--run.folder=run {TRICKS}" in said
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun", "slurm"])
@pytest.mark.parametrize("phase", ["prepare", "train", "tensorboard"])
def test_an_environment_that_is_not_there_is_named(
    tmp_path: Path, launcher: str, phase: str
) -> None:
    """Another Python would be taken without a word."""
    text = render(job(venv="~/venv", storage={"mount": str(tmp_path)}), launcher, phase)
    done = subprocess.run(["bash", "-c", text], text=True, capture_output=True)
    assert done.returncode == 2
    assert done.stderr == (
        "there is no folder ~/venv/bin on this machine; use the whole path of venv\n"
    )


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun", "slurm"])
def test_a_machine_that_cannot_compile_is_told_so(tmp_path: Path, launcher: str) -> None:
    fake = tmp_path / "bin"
    fake.mkdir()
    for name in ("mpirun", "torchrun", "srun"):
        (fake / name).write_text("#!/bin/bash\nexec neuron_parallel_compile\n")
        (fake / name).chmod(0o755)
    text = render(job(storage={"mount": str(tmp_path)}, neuron_sdk="2.28"), launcher, "precompile")
    text = text.replace("cd -- ", f"PATH={fake}:$PATH\ncd -- ", 1)
    done = subprocess.run(["bash", "-c", text], text=True, capture_output=True)
    assert done.returncode == 2
    assert done.stderr == (
        "neuron_parallel_compile is not installed here; start this phase on a machine of the job, "
        "with Neuron SDK 2.28\n"
    )


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_a_linked_pid_file_is_named_and_not_followed(tmp_path: Path, launcher: str) -> None:
    """Neither written when a job starts nor read to find a process to stop."""
    this = job(
        overrides={"data": {"path": "data"}, "run": {"folder": "run"}},
        venv="",
        mpirun__hostfile="",
    )
    (tmp_path / "hosts").write_text("localhost\n")
    fake, pid = tmp_path / "bin", tmp_path / "run" / "logs" / f"train-{platform.node()}.pid"
    fake.mkdir()
    for name in (launcher, "python3"):
        (fake / name).write_text("#!/bin/bash\ntouch started\n")
        (fake / name).chmod(0o755)

    def run(text: str) -> subprocess.CompletedProcess[str]:
        text = text.replace("/fsx/llama", str(tmp_path))
        text = text.replace(f"cd -- {tmp_path}", f"cd -- {tmp_path}\nPATH={fake}:$PATH")
        return subprocess.run(["bash", "-c", text], cwd=tmp_path, text=True, capture_output=True)

    for _ in range(2):
        done = run(render(this, launcher, "train"))
        assert done.returncode == 0, done.stderr
        number, began = pid.read_text().splitlines()[0].split()
        assert number.isdecimal()
        assert began.isdecimal()
    (tmp_path / "started").unlink()
    pid.unlink()
    (tmp_path / "target").write_text("1\n")
    pid.symlink_to(tmp_path / "target")
    done = run(render(this, launcher, "train"))
    assert done.returncode == 2
    assert f"{pid.name} is a link to {tmp_path / 'target'}; remove it" in done.stderr
    assert not (tmp_path / "started").exists()
    assert (tmp_path / "target").read_text() == "1\n"
    assert "no process of" in run(action(this, launcher, "train", "stop")).stdout


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_prepare_has_no_log_to_wait_for(tmp_path: Path, launcher: str) -> None:
    text = action(job(storage={"mount": str(tmp_path)}), launcher, "prepare", "logs")
    done = subprocess.run(["bash", "-c", text], text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "prepare has no log: it writes to the terminal in which it was started\n"
    )


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
@pytest.mark.parametrize("folder", ["run", "my run", "/elsewhere"])
def test_actions_before_a_job_ran_end_well(tmp_path: Path, launcher: str, folder: str) -> None:
    where, node = tmp_path / "it's shared", platform.node()
    this = job(
        overrides={"data": {"path": "data"}, "run": {"folder": folder}},
        venv="",
        mpirun__hostfile="",
        storage__mount=str(tmp_path),
        storage__folder=str(where),
    )
    said = {
        "logs": f"no log yet in {where / folder / 'logs/train' / node}\n",
        "status": f"train: no process of {folder} is running on {node}\n",
        "stop": f"train: no process of {folder} is running on {node}\n",
        "clean": "",
    }
    start = ["bash", "-c", render(this, launcher, "train")]
    done = subprocess.run(start, text=True, capture_output=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"there is no folder {where} on this machine; use one that mounts it\n"
    for what, out in said.items():
        command = ["bash", "-c", action(this, launcher, "train", what)]
        where.mkdir(exist_ok=True)
        done = subprocess.run(command, text=True, capture_output=True, timeout=300)
        assert (done.returncode, done.stdout, done.stderr) == (0, out, "")
        where.rmdir()
        done = subprocess.run(command, text=True, capture_output=True, timeout=300)
        assert (done.returncode, done.stdout) == (2, "")
        assert (
            done.stderr == f"there is no folder {where} on this machine; use one that mounts it\n"
        )


@pytest.mark.parametrize("what", ["logs", "status", "utilization", "stop"])
def test_actions_on_a_kubernetes_job_that_is_not_there_end_well(tmp_path: Path, what: str) -> None:
    """With --ignore-not-found kubectl answers nothing for it, and fails without a cluster."""
    kubectl = tmp_path / "kubectl"
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", "-c", action(job(), "k8s", "train", what)]
    kubectl.write_text("#!/bin/bash\n[[ $* == *--ignore-not-found* ]]\n")
    kubectl.chmod(0o755)
    done = subprocess.run(command, env=environ, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("is not there" in done.stdout) == (what != "stop")
    kubectl.write_text("#!/bin/bash\necho no cluster >&2\nexit 1\n")
    done = subprocess.run(command, env=environ, text=True, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "no cluster\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read on this machine"),
        ("PIPE", "cannot be read on this machine"),
        ("", "lists 0 of 2 nodes"),
        ("# all\n^a\n", "lists 0 of 2 nodes"),
        ("a slots=2\nme@a:2\n", "lists 1 of 2 nodes"),
        ("a\nb slots=4", ""),
        ("+e:2\n", ""),
    ],
)
def test_a_hostfile_that_lists_too_few_nodes_is_one_line(
    tmp_path: Path, text: str | None, message: str
) -> None:
    if text == "PIPE":
        os.mkfifo(tmp_path / "hosts")
    elif text is not None:
        (tmp_path / "hosts").write_text(text)
    (tmp_path / "python3").write_text("#!/bin/bash\necho started\n")
    (tmp_path / "python3").chmod(0o755)
    (tmp_path / "mpirun").symlink_to(tmp_path / "python3")
    this = job(
        nodes=2,
        overrides={"data": {"path": "data"}, "run": {"folder": "run"}},
        storage__mount=str(tmp_path),
        storage__folder=str(tmp_path),
        mpirun__hostfile="hosts",
    )
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", "-c", render(this, "mpirun", "train")]
    done = subprocess.run(command, env=environ, text=True, capture_output=True)
    if message:
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"mpirun.hostfile=hosts {message}\n"
    else:
        assert (done.returncode, done.stdout, done.stderr) == (0, "started\n", "")


@pytest.mark.parametrize(
    ("phase", "missing", "message"),
    [
        ("train", "mpirun", "mpirun is not installed here; install Open MPI, such as the package"),
        ("tensorboard", "tensorboard", "tensorboard is not installed here; pip install 'llamax[te"),
    ],
)
def test_a_missing_program_is_one_line(
    tmp_path: Path, phase: str, missing: str, message: str
) -> None:
    fake = tmp_path / "bin"
    fake.mkdir()
    for folder in os.environ["PATH"].split(":"):
        for program in Path(folder).glob("*"):
            if program.name != missing and not os.path.lexists(fake / program.name):
                (fake / program.name).symlink_to(program)
    this = job(
        overrides={"data": {"path": "data"}, "run": {"folder": "run"}},
        storage__mount=str(tmp_path),
        storage__folder=str(tmp_path),
        mpirun__hostfile="",
    )
    command = ["bash", "-c", render(this, "mpirun", phase)]
    environ = {**os.environ, "PATH": str(fake)}
    done = subprocess.run(command, env=environ, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


JOBS = """llama2-7b-chat-2026-11-29-12-19-39-113 llama2-7b-prepare-20261129120453
my-llama2-7b-20261129120453 llama2-7b-20261129120453 llama2-7b-2026-11-29-12-04-17-792"""


@pytest.mark.parametrize("phase", ["train", "prepare"])
@pytest.mark.parametrize("what", ["status", "stop", "logs", "utilization"])
def test_actions_on_sagemaker_take_the_newest_job_of_just_this_name(
    tmp_path: Path, phase: str, what: str
) -> None:
    aws = tmp_path / "aws"
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(jobs: str, version: str = "2.1", code: int = 0) -> subprocess.CompletedProcess[str]:
        aws.write_text(
            f"#!/bin/bash\ncase $* in\n--version) echo aws-cli/{version} ;;\n"
            f"*list-*-jobs*) echo '{jobs}'; exit {code} ;;\n"
            f'*) echo "$@" >{tmp_path}/did ;;\nesac\n'
        )
        aws.chmod(0o755)
        command = ["bash", "-c", action(job(), "sagemaker", phase, what)]
        return subprocess.run(command, env=environ, text=True, capture_output=True)

    name = "llama2-7b" if phase == "train" else "llama2-7b-prepare"
    assert run(JOBS.replace(" ", "\t")).returncode == 0
    assert f"{name}-20261129120453" in (tmp_path / "did").read_text()
    (tmp_path / "did").unlink()
    for jobs in ("", "None", "my-llama2-7b-20261129120453"):
        done = run(jobs)
        assert (done.returncode, done.stdout) == (0, f"SageMaker has no job {name}\n")
    assert run("", code=255).returncode == 255
    assert not (tmp_path / "did").exists()
    if what == "logs":
        done = run(JOBS, version="1.46")
        assert (done.returncode, done.stderr) == (
            2,
            "aws logs tail needs version 2 of the AWS CLI\n",
        )


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("node-1\nnode-2\n", "node-1"),
        ("# all\n\n  node-1 slots=32 max_slots=64\n", "node-1"),
        ("// all\nnode-1\tslots = 2 # the first\nnode-2", "node-1"),
        ("me@node-1.cluster:32\r\nme@node-2:32\r\n", "node-1.cluster"),
        ('"node-1" slots=1\n', "node-1"),
        ("^node-0\nnode-1\n", "node-1"),
        ("user@10.0.0.1#comment\n", "10.0.0.1"),
        ("fe80::1 slots=2\n", "fe80::1"),
    ],
)
def test_the_master_is_the_first_host_of_a_file(tmp_path: Path, text: str, host: str) -> None:
    (tmp_path / "hosts").write_text(text)
    script = f"hostfile={tmp_path}/hosts\n{FIRST_HOST}echo $MASTER_ADDR"
    done = subprocess.run(["bash", "-euc", script], text=True, capture_output=True, check=True)
    assert done.stdout.strip() == host


@pytest.mark.parametrize("sdk", [2, 3])
def test_sagemakers_file_keeps_values_as_they_are(sdk: int) -> None:
    this = job(
        sagemaker__sdk=sdk, environment={"TRICK": TRICKS + '"""'}, sagemaker__data="s3://" + TRICKS
    )
    text = render(this, "sagemaker", "train")
    module: dict[str, Any] = {}
    constants = text[text.index("SCRIPT = ") : text.index("source = Path")]
    exec(compile(constants, "x", "exec"), module)
    assert module["ARGUMENTS"]["environment"]["TRICK"] == TRICKS + '"""'
    assert module["INPUTS"] == {"training": "s3://" + TRICKS}
