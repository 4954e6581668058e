"""A run resumed on other meshes sees the same samples, and its loss is that of one rank."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support import tiny_run
from support import training_jobs as jobs

from llamax.checkpoint import Checkpoint
from llamax.parallel.rendezvous import Rendezvous
from llamax.train import train

STEPS, HANDED = 20, (7, 13)
CHAINS = {
    "tensor 2 -> 4 -> 1": [(2, "--parallel.tensor=2"), (4, "--parallel.tensor=4"), (1, "")],
    "data 2 -> 4 -> 1": [(2, ""), (4, ""), (1, "")],
    "ZeRO on -> off -> on": [
        (4, "--parallel.tensor=2"),
        (4, "--parallel.tensor=2 --parallel.zero=0"),
        (4, "--parallel.tensor=2"),
    ],
    "sequence parallel on -> off -> on": [
        (4, "--parallel.tensor=2"),
        (4, "--parallel.tensor=2 --parallel.sequence=false"),
        (4, "--parallel.tensor=2"),
    ],
}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("chain", CHAINS)
def test_handed_from_mesh_to_mesh(
    dataset: Path, tmp_path: Path, chain: str, full: bool, report: Callable[[str], None]
) -> None:
    if not full:
        pytest.skip("runs with --full; tests/program/test_train.py hands a run on as well")
    alone = tiny_run.config(dataset, tmp_path / "alone")
    alone = replace(alone, run=replace(alone.run, steps=STEPS))
    train(alone, Rendezvous())
    folder = tmp_path / "run"
    cfg = replace(alone, run=replace(alone.run, folder=str(folder)))
    path = tiny_run.write(cfg, tmp_path / "run.toml")
    for number, (ranks, overrides) in enumerate(CHAINS[chain]):
        if number:
            for later in range(HANDED[number - 1] + 1, STEPS + 1):
                shutil.rmtree(folder / f"checkpoints/step-{later:08d}")
        job = jobs.torchrun(ranks, path, folder, *overrides.split())
        assert job.end() == 0, job.said()
    assert job.said().count("resuming from") == len(HANDED)
    furthest = 0.0
    expected, found = tiny_run.log_of(tmp_path / "alone"), tiny_run.log_of(folder)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["consumed_tokens"] == theirs["consumed_tokens"]
        furthest = max(furthest, abs(mine["loss"] / theirs["loss"] - 1))
        for run in (folder, tmp_path / "alone"):
            state = Checkpoint(run / f"checkpoints/step-{mine['step']:08d}", verify=False).state
            assert state["consumed_sequences"] == cfg.data.global_batch * mine["step"]
    assert furthest < 1e-5
    report(f"{chain}: {STEPS} losses within {furthest:.0e} of one rank's, same samples: ok")
