"""Processes outlive an mpirun that kills at once, and save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llamax.launch.supervise import relay, wait_for_keepers
from llamax.runtime.process import process_state

SUPERVISE = [sys.executable, "-m", "llamax.launch.supervise"]
# Stands for mpirun: forwards SIGUSR1, and kills what it started when it gets SIGTERM.
MPIRUN = """
import os, signal, subprocess, sys
child = subprocess.Popen(sys.argv[1:], start_new_session=True)
def end(*_):
    child.terminate()
    child.kill()
    os._exit(1)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGUSR1, lambda *_: child.send_signal(signal.SIGUSR1))
open("started", "w").write(str(os.getpid()))
sys.exit(child.wait())
"""
# Stands for a rank: saves after SIGTERM, and only after a second one would it not.
RANK = """
import os, signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
print("step 1", flush=True)
open("ready", "w").write(str(os.getpid()))
while not asked and os.path.exists("ready"):
    time.sleep(0.01)
for _ in range(40):
    time.sleep(0.01)
assert len(asked) == 1
open("saved", "w").close()
print("saved it", file=sys.stderr, flush=True)
sys.exit(75)
"""

# Runs the keeper where a wait without end is an error: it would delay a signal that comes before.
NO_BLOCKING = """
import os, subprocess, sys
from llamax.launch.supervise import main
def wait(self, timeout=None):
    assert timeout is not None
subprocess.Popen.wait = wait
waitpid = os.waitpid
def waited(pid, options):
    assert options & os.WNOHANG
    return waitpid(pid, options)
os.waitpid = waited
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("role", ["start", "rank", "node"])
def test_no_wait_delays_a_signal(tmp_path: Path, role: str) -> None:
    command = [sys.executable, "-c", NO_BLOCKING, role, str(tmp_path), "sh", "-c", "exit 7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (7, "")


# Runs the keeper where a second signal comes in while it passes the first one on.
TWO_AT_ONCE = """
import os, signal, subprocess, sys, time
from llamax.launch.supervise import main
def twice(original):
    def send(*arguments):
        if not os.path.exists("twice") and os.getpid() != own:
            open("twice", "w").close()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # the process has handled what it got
        original(*arguments)
    return send
own = os.getpid()
os.killpg = twice(os.killpg)
subprocess.Popen.send_signal = twice(subprocess.Popen.send_signal)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("role", ["rank", "node"])
def test_two_signals_at_once_are_one_to_the_process(tmp_path: Path, role: str) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-c", TWO_AT_ONCE, role, "processes", sys.executable, "rank.py"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.terminate()
    assert process.communicate(timeout=300) == ("step 1\n", "saved it\n")
    assert (tmp_path / "twice").exists()
    assert (tmp_path / "saved").exists()


@pytest.fixture(params=["rank", "node"])
def run(tmp_path: Path, request: pytest.FixtureRequest) -> subprocess.Popen[str]:
    (tmp_path / "mpirun.py").write_text(MPIRUN)
    (tmp_path / "rank.py").write_text(RANK)
    inner = [*SUPERVISE, request.param, "processes", sys.executable, "rank.py"]
    command = [*SUPERVISE, "start", "processes", sys.executable, "mpirun.py", *inner]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)
    ready, started = tmp_path / "ready", tmp_path / "started"
    while not (ready.exists() and started.exists() and started.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_mpirun_is_ended(
    tmp_path: Path, run: subprocess.Popen[str], number: signal.Signals
) -> None:
    os.kill(int((tmp_path / "started").read_text()), number)
    out, err = run.communicate(timeout=300)
    assert (tmp_path / "saved").exists()
    assert (run.returncode, out) == (75, "step 1\n")
    assert err == "saved it\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_the_job_is_asked_to_stop(
    tmp_path: Path, run: subprocess.Popen[str], number: signal.Signals
) -> None:
    run.send_signal(number)
    out, err = run.communicate(timeout=300)
    assert (tmp_path / "saved").exists()
    code = 130 if number == signal.SIGINT else 75
    assert (run.returncode, out, err) == (code, "step 1\n", "saved it\n")


def test_the_job_is_killed(tmp_path: Path, run: subprocess.Popen[str]) -> None:
    """Nobody waits for the ranks any more, but they save."""
    run.kill()
    run.communicate(timeout=300)
    assert (tmp_path / "saved").exists()


def test_a_keeper_that_is_gone_is_not_waited_for(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    host, own = os.uname().nodename, process_state(os.getpid())[1]
    (tmp_path / f"{host}-{ended.pid}.process").write_text("began 1")
    (tmp_path / f"{host}-{os.getpid()}.process").write_text(f"began {own + 1}")  # an id used anew
    (tmp_path / f"{host}-1.process").write_text("ended 75")
    (tmp_path / f"{host}-x.process").write_text(f"began {own}")
    (tmp_path / "other-machine-7.process").write_text("began 5")
    assert wait_for_keepers(tmp_path, wait_s=0) == [75]


@pytest.mark.parametrize(
    "text", ["", "75", "ended x", "began", "ended \u0661", "began " + "9" * 999]
)
def test_a_report_of_something_else_is_waited_for_in_vain(tmp_path: Path, text: str) -> None:
    (tmp_path / f"{os.uname().nodename}-1.process").write_text(text)
    assert wait_for_keepers(tmp_path, wait_s=0) == []


@pytest.mark.parametrize("planted", ["pipe", "folder", "link", "lost link", "another user's"])
def test_files_that_others_put_there_are_no_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    """Whoever may write to the folder must neither end a job nor keep it from ending."""
    folder, host = tmp_path / "processes", os.uname().nodename
    folder.mkdir()
    report, began = folder / f"{host}-{os.getpid()}.process", process_state(os.getpid())[1]
    (tmp_path / "report").write_text(f"began {began}")
    if planted == "pipe":
        os.mkfifo(report)
    elif planted == "folder":
        report.mkdir()
    elif planted.endswith("link"):
        report.symlink_to(tmp_path / ("none" if planted == "lost link" else "report"))
    else:
        report.write_text(f"began {began}")
        monkeypatch.setattr(os, "geteuid", lambda: report.stat().st_uid + 1)
    assert wait_for_keepers(folder, wait_s=1000) == []


@pytest.mark.parametrize("role", ["start", "rank", "node"])
def test_links_in_the_folder_are_not_followed(tmp_path: Path, role: str) -> None:
    """Neither is what lies in the target removed."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "a.log").write_text("a file of the user")
    (tmp_path / "processes").symlink_to(target)
    command = [*SUPERVISE, role, "processes", "true"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr == f"llamax: processes is a link to {target}; remove it\n"
    assert [path.name for path in target.iterdir()] == ["a.log"]


def test_files_of_others_stay_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "processes"
    folder.mkdir()
    for name in ("notes.txt", "old-1.process", "old-1.log"):
        (folder / name).write_text("x")
    command = [*SUPERVISE, "start", "processes", *SUPERVISE, "rank", "processes", "false"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=300)
    assert done.returncode == 1, done.stderr
    (report,) = folder.glob("*.process")
    assert report.read_text() == "ended 1"
    assert sorted(path.name for path in folder.iterdir()) == sorted([report.name, "notes.txt"])


def test_a_linked_log_ends_the_job_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "processes"
    folder.mkdir()
    (tmp_path / "target").write_text("x")
    (folder / "a.log").symlink_to(tmp_path / "target")
    command = [*SUPERVISE, "start", "processes", "true"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=300)
    assert done.returncode == 2
    assert "a.log is a link to" in done.stderr
    assert (tmp_path / "target").read_text() == "x"


def test_output_that_nobody_reads_goes_into_a_file(tmp_path: Path) -> None:
    source, writer = os.pipe()
    reader, target = os.pipe()
    thread = threading.Thread(target=relay, args=(source, target, tmp_path / "lost"))
    thread.start()
    os.write(writer, b"first\n")
    assert os.read(reader, 100) == b"first\n"
    os.close(reader)
    os.write(writer, b"second\n")
    os.close(writer)
    thread.join()
    assert (tmp_path / "lost").read_bytes() == b"second\n"
