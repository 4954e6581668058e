"""A rank is killed or frozen: the others end in time and name it; a restart continues the run."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from support import tiny_run
from support import training_jobs as jobs

TIMEOUT_S = 60  # of the jobs: they may also join that late
MOST_S = 400  # guards against hanging


def the_others_name(
    victim: int, lost: list[int], job: jobs.Job, others: list[int], began: float
) -> float:
    """Wait for the other ranks to end in time, having named the victim and its last step.

    ``lost``: processes that may be frozen; they are killed then, as their launcher would later.
    """
    while any(jobs.runs(pid) for pid in others):
        assert time.monotonic() - began < MOST_S, job.said()
        time.sleep(0.05)
    took_s = time.monotonic() - began
    for pid in lost:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert job.end() != 0
    named = re.search(rf"rank {victim} \(last step (\d+)\) (died|fell|ended|silent)", job.said())
    assert named, job.said()
    assert int(named[1]) >= 4
    return took_s


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_the_others_end_and_name_it(
    dataset: Path,
    tmp_path: Path,
    how: signal.Signals,
    victim: int,
    launcher: str,
    full: bool,
    report: Callable[[str], None],
) -> None:
    if (victim == 0 or how == signal.SIGKILL or launcher == "mpirun") and not full:
        pytest.skip("runs with --full; the restart below kills as well")
    if launcher == "mpirun" and not jobs.has_mpirun():
        pytest.skip("mpirun is not installed")
    folder, ranks = tmp_path / "run", 4 if full else 2
    path = tiny_run.write(jobs.config(dataset, folder, 100_000, TIMEOUT_S), tmp_path / "c.toml")
    start = jobs.torchrun if launcher == "torchrun" else jobs.mpirun
    job = start(ranks, path, folder, "--parallel.tensor=2")
    pids = job.wait_for_ranks(ranks)
    job.wait_for_steps(4)
    os.kill(pids[victim], how)
    others = [pid for pid in pids if pid != pids[victim]]
    took_s = the_others_name(victim, [pids[victim]], job, others, time.monotonic())
    report(
        f"{launcher}, {how.name} of rank {victim}: all {len(others)} others ended and named it "
        f"after {took_s:.1f} s: ok"
    )


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_node_is_lost_with_what_the_ranks_met_at(
    dataset: Path,
    tmp_path: Path,
    how: signal.Signals,
    full: bool,
    report: Callable[[str], None],
) -> None:
    """Node 0 has rank 0, and an agent that serves the store of all ranks."""
    if not full:
        pytest.skip("runs with --full")
    folder = tmp_path / "run"
    path = tiny_run.write(jobs.config(dataset, folder, 100_000, TIMEOUT_S), tmp_path / "c.toml")
    lost, stays = jobs.nodes(2, path, folder, "--parallel.tensor=2")
    (first,), (other,) = lost.wait_for_ranks(1), stays.wait_for_ranks(1)
    stays.wait_for_steps(4)
    gone = [lost.process.pid, first]
    for pid in gone:
        os.kill(pid, how)
    took_s = the_others_name(0, gone, stays, [other], time.monotonic())
    report(
        f"{how.name} of node 0, agent and rank: the other ended and named it "
        f"after {took_s:.1f} s: ok"
    )


@pytest.mark.timeout(1200)
def test_a_restart_continues_the_same_curve(
    dataset: Path, tmp_path: Path, full: bool, report: Callable[[str], None]
) -> None:
    steps, logs = 14, {}
    for name in ("whole", "killed"):
        folder = tmp_path / name
        cfg = jobs.config(dataset, folder, steps, every=2)
        path = tiny_run.write(cfg, tmp_path / f"{name}.toml")
        job = jobs.torchrun(2, path, folder, "--parallel.tensor=2", restarts=3)
        for kill in range((2 if full else 1) if name == "killed" else 0):
            job.wait_for_steps(4 + 4 * kill)
            known = job.wait_for_ranks(2)
            os.kill(known[kill % 2], signal.SIGKILL)
            while set(job.ranks()) & set(known):
                time.sleep(0.05)
        assert job.end() == 0, job.said()
        logs[name] = tiny_run.log_of(folder)
        if name == "killed":
            assert "resuming from" in job.said()
    assert logs["whole"] == logs["killed"]
    assert [record["step"] for record in logs["whole"]] == [*range(1, steps + 1)]
    report(f"restart by torchrun after SIGKILL: all {steps} records byte-equal: ok")
