"""``--action stop`` ends the process that wrote the pid file, and no other."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.launch_jobs import job

from llamax.launch.render import action, render

LAUNCHERS = ("torchrun", "mpirun")


def script(text: str, folder: Path) -> list[str]:
    """The command that runs a rendered text in a folder, where python3 and torchrun wait."""
    text = text.replace("/fsx/llama", str(folder))
    return [
        "bash",
        "-c",
        text.replace("set -euo pipefail", f"set -euo pipefail\nPATH={folder}:$PATH"),
    ]


def run(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(script(text, folder), text=True, capture_output=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("torchrun", "python3", "mpirun", "neuron_parallel_compile"):
        (tmp_path / name).write_text("#!/bin/bash\ntouch started\nexec -a llamax.train sleep 600\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that only its arguments make look like one of llamax."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "llamax"])
    yield process
    assert process.poll() is None, "the stranger was signalled"
    process.kill()
    process.wait()


def the_job(launcher: str) -> tuple[str, str, str]:
    """The texts that start, show and stop a job."""
    hosts = {"mpirun__hostfile": ""} if launcher == "mpirun" else {}
    this = job(overrides={"data": {"path": "data"}, "run": {"folder": "run"}}, **hosts)
    shown = (action(this, launcher, "train", what) for what in ("status", "stop"))
    return (render(this, launcher, "train"), *shown)  # type: ignore[return-value]


def another(launcher: str, what: str) -> str:
    """The text of another action on the same job."""
    this = job(overrides={"data": {"path": "data"}, "run": {"folder": "run"}})
    return action(this, launcher, "train", what)


def pid_file(folder: Path) -> Path:
    (folder / "run/logs").mkdir(parents=True, exist_ok=True)
    return folder / "run/logs" / f"train-{platform.node()}.pid"


def of_this_run(folder: Path, name: str = "train", run: str = "run") -> str:
    """The second line of a pid file: its phase, machine and run."""
    text = f"{name}-{platform.node()}.pid of {os.path.realpath(folder / run)}"
    quoted = subprocess.run(
        ["bash", "-c", 'printf %q "$1"', "", text], text=True, capture_output=True, check=True
    )
    return f"{quoted.stdout}\n"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_process_that_wrote_it_is_stopped(folder: Path, launcher: str) -> None:
    start, status, stop = the_job(launcher)
    process = subprocess.Popen(script(start, folder))
    limit = time.monotonic() + 300
    while not (folder / "started").exists():
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
    first, of_run = pid_file(folder).read_text().splitlines(keepends=True)
    number, began = first.split()
    assert of_run == of_this_run(folder)
    assert pid_file(folder).stat().st_mode & 0o022 == 0
    assert int(number) == process.pid
    stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    assert began == stat[19]
    assert number in run(status, folder).stdout
    again = run(start, folder)
    assert again.returncode == 2
    assert f"already runs here as process {number}; stop it first" in again.stderr
    done = run(another(launcher, "clean"), folder)
    assert done.returncode == 2
    assert done.stderr == f"train of run runs here as process {number}; stop it first\n"
    log = folder / "run" / "logs" / "train" / platform.node() / "x" / "0" / "stderr.log"
    log.parent.mkdir(parents=True)
    log.write_text("step 1\n")
    (folder / "run" / "logs" / "train-processes").mkdir(exist_ok=True)
    logs = subprocess.Popen(script(another(launcher, "logs"), folder), stdout=subprocess.PIPE)
    assert logs.stdout
    assert logs.stdout.readline() == b"step 1\n"
    done = run(stop, folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"train of run was asked to save and end; process {number} then ends\n"
    assert process.wait(300) == -signal.SIGTERM
    assert logs.wait(300) == 0, "the log is followed as long as the job runs"
    assert "no process of run is running" in run(stop, folder).stdout
    assert run(another(launcher, "logs"), folder).stdout == "step 1\n"
    assert run(another(launcher, "clean"), folder).returncode == 0
    assert list((folder / "run" / "logs").iterdir()) == []


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(
    "text",
    [
        "{pid}",
        "{pid} ",
        "{pid} 1",
        "{pid} x",
        "-1",
        "-1 1",
        "0 0",
        "-{pid} {began}",
        "",
        "\n",
        "a b",
    ]
    + ["{pid},{pid} {began}", "1 {began}", "$(touch pwned) 1", "{pid}\n{began}", "\x1b[2J 1", "*"],
)
def test_a_stranger_is_never_signalled(
    folder: Path, stranger: subprocess.Popen[bytes], launcher: str, text: str
) -> None:
    stat = Path(f"/proc/{stranger.pid}/stat").read_text().rpartition(")")[2].split()
    first = text.format(pid=stranger.pid, began=stat[19])
    pid_file(folder).write_text(f"{first}\n{of_this_run(folder)}")
    _, status, stop = the_job(launcher)
    for each in (status, stop):
        done = run(each, folder)
        assert (done.returncode, done.stderr) == (0, "")
        assert "train: no process of run is running on" in done.stdout
    assert not list(folder.rglob("pwned"))


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("of", ["", "\n", "of run\n", "another run", "another phase", "a pipe"])
def test_a_pid_file_of_another_run_stops_nothing(
    folder: Path, stranger: subprocess.Popen[bytes], launcher: str, of: str
) -> None:
    """Whoever may write to the folder can move a user's own file there from another run."""
    stat = Path(f"/proc/{stranger.pid}/stat").read_text().rpartition(")")[2].split()
    second = {
        "another run": of_this_run(folder, run="other"),
        "another phase": of_this_run(folder, "prepare"),
    }
    if of == "a pipe":
        os.mkfifo(pid_file(folder))
    else:
        pid_file(folder).write_text(f"{stranger.pid} {stat[19]}\n{second.get(of, of)}")
    for each in (*the_job(launcher)[1:], another(launcher, "clean")):
        done = run(each, folder)
        assert (done.returncode, done.stderr) == (0, "")
    assert stranger.poll() is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_pid_file_of_another_user_stops_nothing(
    folder: Path, stranger: subprocess.Popen[bytes], launcher: str
) -> None:
    stat = Path(f"/proc/{stranger.pid}/stat").read_text().rpartition(")")[2].split()
    pid_file(folder).write_text(f"{stranger.pid} {stat[19]}\n{of_this_run(folder)}")
    os.chown(pid_file(folder), 12345, 12345)
    done = run(the_job(launcher)[2], folder)
    assert done.returncode == 2
    assert "belongs to another user" in done.stderr


def test_without_proc_the_date_decides(folder: Path, stranger: subprocess.Popen[bytes]) -> None:
    """As on macOS."""
    _, status, _ = (text.replace("/proc/", "/no-proc/") for text in the_job("torchrun"))
    command = ["ps", "-o", "lstart=", "-p", str(stranger.pid)]
    began = subprocess.run(command, text=True, capture_output=True, check=True).stdout
    first = f"{stranger.pid} {' '.join(began.split())}"
    pid_file(folder).write_text(f"{first}\n{of_this_run(folder)}")
    assert str(stranger.pid) in run(status, folder).stdout
    pid_file(folder).write_text(f"{stranger.pid} Mon Jan  1 00:00:00 2001\n")
    assert "no process of run is running" in run(status, folder).stdout
