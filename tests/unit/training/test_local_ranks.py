"""The ranks that ``llamax train --ranks`` starts: their environment and the code of their end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from support import tiny_run

from llamax.cli.train import main
from llamax.parallel.rendezvous import rendezvous
from llamax.runtime import signals
from llamax.runtime.errors import ConfigError
from llamax.training.local_ranks import START, rank_environment, wait_for


def started(command: str) -> BaseProcess:
    """A rank's process that runs a command of the shell."""
    process = START.Process(target=os.execvp, args=("sh", ["sh", "-c", f"exec 2>&-; {command}"]))
    process.start()
    return process


def test_ranks_meet_on_the_loopback_whatever_launcher_came_before() -> None:
    mpi = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "HOME": "/home/me"}
    environments = rank_environment(mpi, 3)
    found = [rendezvous(environment) for environment in environments]
    assert [where.rank for where in found] == [where.local_rank for where in found] == [0, 1, 2]
    assert {(where.world_size, where.address, where.launcher) for where in found} == {
        (3, "127.0.0.1", "torchrun")
    }
    assert len({where.port for where in found}) == 1
    assert environments[0]["HOME"] == "/home/me"


@pytest.mark.parametrize(
    ("commands", "code"),
    [
        (["exit 0", "exit 0"], 0),
        (["exit 75", "exit 75"], 75),
        (["exit 75", "exit 130"], 130),
        (["exit 75", "exit 2"], 2),
        (["exit 0", "kill -KILL $$"], 137),
        (["exec sleep 900", "exit 3"], 3),
    ],
)
def test_the_code_of_a_run_is_that_of_its_ranks(commands: list[str], code: int) -> None:
    """A rank that waits for one that failed is not waited for."""
    programs = [started(command) for command in commands]
    try:
        assert wait_for(programs, ending_s=0.2) == code
        if "sleep" in commands[0]:
            assert programs[0].exitcode is None
    finally:
        for program in programs:
            program.kill()
            program.join()


def test_the_first_rank_that_fails_gives_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    first = started("exit 4")
    first.join()
    waits, frozen = started("exec sleep 900"), started("kill -STOP $$")
    assert wait_for([waits, first, frozen], ending_s=0.3) == 4
    assert capsys.readouterr().err == (
        "llamax: ranks 0, 2 have not ended after rank 1 failed with exit code 4, and will be "
        "killed in 0 s\n"
    )
    for program in (waits, frozen):
        program.kill()
        program.join()


FORKING = r"""
import os, signal, sys, threading
from llamax.runtime import signals
from llamax.training.local_ranks import run_ranks

def rank(variables):
    apart = os.getsid(0) == os.getpid() and os.read(0, 1) == b""
    line = f"{variables['RANK']} {apart} {threading.active_count()}\n"
    os.write(1, line.encode())  # at once: the ranks write to one pipe
    return 3 if variables["RANK"] == "1" and sys.argv[1] == "fails" else 0

signals.install()
signals.pass_on(lambda number: None)
print(threading.active_count(), flush=True)
signals.install()
sys.exit(run_ranks(rank, 2, os.environ))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ranks are new programs")
@pytest.mark.parametrize(("word", "code"), [("works", 0), ("fails", 3)])
def test_ranks_are_forked_from_a_process_with_one_thread(word: str, code: int) -> None:
    command = [sys.executable, "-c", FORKING, word]
    done = subprocess.run(command, input="typed", capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    one, *ranks = done.stdout.splitlines()
    assert one == "1"
    assert sorted(ranks) == [f"{rank} True 2" for rank in (0, 1)]


def test_a_signal_to_the_parent_goes_to_every_rank() -> None:
    """Also one that comes while the ranks are started."""
    script = FORKING.replace("return 3 if", "threading.Event().wait()\n    return 3 if")
    command = [sys.executable, "-c", script, "waits"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        program.stdout.readline()
        program.stdout.readline()  # one rank waits
        program.send_signal(signal.SIGTERM)
        said = program.stderr.read().decode()
        assert program.wait(300) == 75
    assert said.startswith("llamax: stopped by SIGTERM before training began")
    assert said.count("\n") == 1


def test_ranks_inside_a_launcher_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_run.write(tiny_run.config(tmp_path, tmp_path / "run"), tmp_path / "c.toml")
    for key, value in rank_environment({}, 1)[0].items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match="--ranks 2 in a program that torchrun started"):
        main(["--config", str(path), "--ranks", "2"])


def test_no_ranks_to_start_are_refused(tmp_path: Path) -> None:
    path = tiny_run.write(tiny_run.config(tmp_path, tmp_path / "run"), tmp_path / "c.toml")
    with pytest.raises(ConfigError, match="--ranks 0 is out of range; use 1 or more"):
        main(["--config", str(path), "--ranks", "0"])
    assert not (tmp_path / "run").exists()


def test_only_under_torchrun_its_traceback_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert signals.aftermath() == ""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert "torchrun now ends with code 1" in signals.aftermath()
