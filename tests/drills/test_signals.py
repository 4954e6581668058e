"""SIGTERM and SIGUSR1 at random moments: all ranks save the same step and exit with its code."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from support import tiny_run
from support import training_jobs as jobs

from llamax.checkpoint import Checkpoint, newest_checkpoint
from llamax.runtime.errors import Stopped
from llamax.runtime.signals import REPEAT_S

RANKS = 2
LAUNCHERS = ("torchrun", "mpirun")


def begin(launcher: str, path: Path, folder: Path) -> jobs.Job:
    torchrun = partial(jobs.torchrun, ending_s=jobs.PATIENT_S // 2)
    start = {"torchrun": torchrun, "mpirun": jobs.mpirun, "--ranks": jobs.local_ranks}
    return start[launcher](RANKS, path, folder, "--parallel.tensor=2")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("launcher", ["", *LAUNCHERS, "--ranks"])
def test_ctrl_c_and_a_lost_terminal_save(
    dataset: Path, tmp_path: Path, launcher: str, signum: signal.Signals
) -> None:
    if launcher == "mpirun" and (not jobs.has_mpirun() or signum == signal.SIGHUP):
        pytest.skip("mpirun is not installed, or ends without a word to its ranks")
    folder = tmp_path / "run"
    path = tiny_run.write(jobs.config(dataset, folder, 100_000, every=0), tmp_path / "c.toml")
    job = begin(launcher, path, folder) if launcher else jobs.alone(path, folder)
    job.wait_for_steps(3)
    job.process.send_signal(signum)
    code = job.end()
    steps = re.findall(r"stopped after step (\d+)", job.said())
    saved = newest_checkpoint(folder)
    assert saved is not None, job.said()
    assert steps == [str(Checkpoint(saved).step)], job.said()
    if launcher in ("", "--ranks"):
        assert code == (130 if signum == signal.SIGINT else 75)
        assert "Traceback" not in job.said()
    by_torchrun = "torchrun now ends with code 1 and a traceback" in job.said()
    assert by_torchrun == (launcher == "torchrun")
    logs = [log.read_text() for log in folder.glob("logs/*/rank-*.log")]
    assert logs
    assert "Traceback" not in "".join([*logs, *job.ours()])


@pytest.mark.timeout(1200)
def test_ranks_save_when_the_program_that_started_them_is_killed(
    dataset: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    path = tiny_run.write(jobs.config(dataset, folder, 100_000, every=0), tmp_path / "c.toml")
    job = begin("--ranks", path, folder)
    job.wait_for_steps(3)
    ranks = job.ranks()
    job.process.kill()
    job.end()
    deadline = time.monotonic() + jobs.PATIENT_S  # guards against hanging
    while any(map(jobs.runs, ranks)):
        assert time.monotonic() < deadline, job.said()
        time.sleep(0.05)
    assert newest_checkpoint(folder) is not None, job.said()
    assert re.findall(r"stopped after step \d+ by SIGTERM", job.said()), job.said()


@pytest.mark.timeout(1200)
def test_a_second_ctrl_c_ends_the_ranks_of_torchrun_at_once(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    path = tiny_run.write(jobs.config(dataset, folder, 100_000, every=0), tmp_path / "c.toml")
    job = begin("torchrun", path, folder)
    job.wait_for_steps(3)
    rank, other = job.ranks()
    os.kill(rank, signal.SIGSTOP)  # the other rank waits for it in a collective
    job.process.send_signal(signal.SIGINT)
    job.wait_until(lambda: "SIGINT: the run saves after this step" in job.rank_log(1))
    time.sleep(2 * REPEAT_S)
    job.process.send_signal(signal.SIGINT)
    job.wait_until(lambda: not jobs.runs(other))
    os.kill(rank, signal.SIGCONT)
    job.end()
    assert newest_checkpoint(folder) is None
    logs = [log.read_text() for log in folder.glob("logs/*/rank-*.log")]
    assert "Traceback" not in "".join([*logs, *job.ours()])


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_signals_at_random_moments(
    dataset: Path, tmp_path: Path, launcher: str, full: bool, report: Callable[[str], None]
) -> None:
    if launcher == "mpirun" and not jobs.has_mpirun():
        pytest.skip("mpirun is not installed")
    folder = tmp_path / "run"
    path = tiny_run.write(jobs.config(dataset, folder, 100_000, every=3), tmp_path / "c.toml")
    chance, early = random.Random(launcher), 0
    moments, first = (20, 0) if full else (1, LAUNCHERS.index(launcher))
    for number in range(first, first + moments):
        before = newest_checkpoint(folder)
        signum = (signal.SIGTERM, signal.SIGUSR1)[number % 2]
        job = begin(launcher, path, folder)
        ranks = job.wait_for_ranks(RANKS)
        if number % 3 == 0:  # in a step, in a save
            job.wait_for_steps(job.steps() + 4)
        time.sleep(chance.uniform(0.0, 3.0))
        # A launcher passes SIGTERM on, but then ends with a code of its own. SIGUSR1 is for ranks:
        # torchrun would end at it without a word to them.
        directly = signum == signal.SIGUSR1 or number % 4 == 2
        whom = ranks if directly else [job.process.pid]
        for again in range(1 + number % 2):
            time.sleep(0.1 * again)
            for pid in whom:
                with suppress(ProcessLookupError):  # it has ended already
                    os.kill(pid, signum)
        code = job.end()
        said = re.findall(r"stopped (?:by \w+ )?(after step (\d+)|before|in the first)", job.said())
        assert said, job.said()
        assert "Traceback" not in "".join(job.ours()), job.said()
        codes = {code} if launcher == "mpirun" else set()
        codes |= {int(found) for found in re.findall(r"exitcode\s*: (-?\d+)", job.said())}
        if directly:
            assert codes == {Stopped.exit_code}, job.said()
        after = newest_checkpoint(folder)
        steps = {int(step) for _, step in said if step}
        if steps:
            assert after is not None
            assert steps == {Checkpoint(after).step}, "all ranks stopped after the step it holds"
            Checkpoint(after).verify()
        else:
            early += 1
            assert after == before
        assert not list((folder / "checkpoints").glob("*.tmp"))
        job.stderr.unlink()
        when = f"after step {max(steps)}" if steps else "before the first step"
        print(f"{launcher} {number}: {signal.Signals(signum).name}, stopped {when}", flush=True)
    report(
        f"SIGTERM/SIGUSR1 under {launcher}: {moments} moments, {early} before the first step: ok"
    )
