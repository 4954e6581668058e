"""Saving by time: the clock of rank 0 decides, all ranks save after the same step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import TINY
from support.tiny_run import config, log_of, make_dataset
from support.world import Worlds, axes

from llamax.config.schema import OptimConfig
from llamax.data.loader import Batch
from llamax.model.llama import Llama
from llamax.optim.zero import Zero
from llamax.parallel.mesh import Mesh
from llamax.parallel.rendezvous import Rendezvous
from llamax.train import train
from llamax.training.save_timer import SaveTimer
from llamax.training.step import TrainState
from llamax.training.step_check import StepCheck


class Clock:
    """A clock that goes ``tick_s`` at each look."""

    def __init__(self, tick_s: float = 0.0) -> None:
        self.now_s, self.tick_s = 0.0, tick_s

    def __call__(self) -> float:
        self.now_s += self.tick_s
        return self.now_s


def test_the_interval_begins_with_each_save() -> None:
    clock = Clock()
    timer, never = SaveTimer(1.5, clock), SaveTimer(0.0, clock)
    found = []
    for now_s in (0.0, 89.9, 90.0, 91.0, 179.9, 180.0):
        clock.now_s = now_s
        found.append(timer.due())
    assert found == [False, False, True, False, False, True], "asks once for each interval"
    clock.now_s = 260.0
    timer.restart()
    clock.now_s = 349.9
    assert not timer.due(), "another save began a new interval"
    clock.now_s = 350.0
    assert timer.due()
    assert not never.due()


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("every", "minutes", "expected"),
    [
        (0, 0.0, [12]),
        (0, 1.0, [2, 4, 6, 8, 10, 12]),  # asked in 1, and in the step after each save
        (0, 2.0, [3, 6, 9, 12]),  # asked in 2, 5, ... and read in the step after
        (0, 60.0, [12]),
        (2, 2.0, [2, 4, 6, 8, 10, 12]),  # asked in 2 and answered by the save of that step
        (4, 3.0, [4, 8, 12]),
    ],
)
def test_a_run_saves_by_time_and_by_step(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every: int,
    minutes: float,
    expected: list[int],
) -> None:
    """On a clock that goes a minute a step."""
    cfg = config(make_dataset(tmp_path), tmp_path / "run")
    cfg = replace(
        cfg,
        run=replace(cfg.run, steps=12, validate_every=0),
        checkpoint=replace(cfg.checkpoint, every=every, every_minutes=minutes),
    )
    clock = Clock()

    class StepTimer(SaveTimer):
        def __init__(self, minutes: float) -> None:
            super().__init__(minutes, clock)

        def due(self) -> bool:
            clock.now_s += 60.0
            return super().due()

    monkeypatch.setattr("llamax.train.SaveTimer", StepTimer)
    train(cfg, Rendezvous())
    assert saved_steps(tmp_path / "run") == expected
    if every or minutes != 2.0:
        return
    log, weights = log_of(tmp_path / "run"), tmp_path / "run" / "checkpoints" / "step-00000012"
    before = {path.name: path.read_bytes() for path in weights.glob("*.safetensors")}
    for later in (9, 12):  # killed after the save of step 6, and resumed
        (tmp_path / "run" / "checkpoints" / f"step-{later:08d}" / "done").unlink()
    train(cfg, Rendezvous())
    assert saved_steps(tmp_path / "run") == [3, 6, 9, 12], "asked in the second step and so on"
    assert log_of(tmp_path / "run") == log
    assert {path.name: path.read_bytes() for path in weights.glob("*.safetensors")} == before


def requests_seen(mesh: Mesh, stops: dict[int, int], saves: set[int]) -> list[tuple[bool, int]]:
    """Of five steps: whether to stop, and the last request to save; rank 0 alone asks for it.

    ``stops``: the steps in which a rank wants to stop, and that rank.
    """
    own = axes(mesh)
    model = Llama(TINY, own.tp).init(0)
    parameters, optim = model.sharded_parameters(), OptimConfig()
    optimizer = Zero(parameters, optim, own, sequence_parallel=False)
    state = TrainState(
        model, optimizer, own, step_tokens=8 * own.data.size, learning_rate=lambda step: 1e-3
    )
    check, seen, rank = StepCheck(0, lambda step: []), [], own.world.rank
    for number in range(1, 6):
        ids = torch.arange(9).unsqueeze(0)
        batch = Batch(ids[:, :-1], ids[:, 1:], torch.arange(8).expand(1, 8), None)
        save = rank == 0 and number in saves
        stop = check.add(state.step([batch], number, stops.get(number) == rank, save))
        seen.append((stop, check.save_requested))
    return seen


def test_all_ranks_see_the_request_in_the_step_after(worlds: Worlds) -> None:
    found = worlds(4).run(requests_seen, Mesh(tp=2, dp=2), {}, {2})
    assert found == 4 * [[(False, 0), (False, 0), (False, 2), (False, 2), (False, 2)]]


def test_a_request_to_stop_hides_none_to_save_that_came_before(worlds: Worlds) -> None:
    found = worlds(4).run(requests_seen, Mesh(tp=2, dp=2), {3: 0, 4: 3}, {1, 3, 4})
    assert found == 4 * [[(False, 0), (False, 1), (False, 1), (True, 1), (True, 1)]]
