"""A rank is killed or frozen: the others end in time and name it; a restart goes on alike."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jobs
import pytest
import tiny_run

TIMEOUT_S = 8  # of the jobs


@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_and_name_it(
    dataset: Path,
    tmp_path: Path,
    how: signal.Signals,
    victim: int,
    full: bool,
    tell: Callable[[str], None],
) -> None:
    if (victim == 0 or how == signal.SIGKILL) and not full:
        pytest.skip("runs with --full; the restart below kills as well")
    folder = tmp_path / "run"
    path = tiny_run.write(jobs.config(dataset, folder, 100_000), tmp_path / "c.toml")
    job = jobs.torchrun(2, path, folder, "--parallel.tensor=2")
    ranks = job.wait_for_ranks(2)
    job.wait_for_steps(4)
    os.kill(ranks[victim], how)
    began, other = time.monotonic(), ranks[1 - victim]
    while Path(f"/proc/{other}").exists() and job.process.poll() is None:
        assert time.monotonic() - began < TIMEOUT_S + 45, job.said()
        time.sleep(0.05)
    took_s = time.monotonic() - began
    assert job.end() != 0
    named = re.search(rf"rank {victim} \(last step (\d+)\) (died|fell|ended|silent)", job.said())
    assert named, job.said()
    assert int(named[1]) >= 4
    tell(f"{how.name} of rank {victim}: the other ended after {took_s:.1f} s and named it: ok")


@pytest.mark.timeout(900)
def test_a_restart_continues_the_same_curve(
    dataset: Path, tmp_path: Path, full: bool, tell: Callable[[str], None]
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
        assert job.end(300) == 0, job.said()
        logs[name] = tiny_run.log_of(folder)
        if name == "killed":
            assert "resuming from" in job.said()
    assert logs["whole"] == logs["killed"]
    assert [record["step"] for record in logs["whole"]] == [*range(1, steps + 1)]
    tell(f"restart by torchrun after SIGKILL: all {steps} records byte-equal: ok")
