"""A run in float16: its records show the loss scale, and a resume repeats every bit of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from support import tiny_run
from support.models import TINY
from support.step_reference import build, share, training

from llamax.config.constants import HEARTBEATS_FOLDER
from llamax.config.schema import Config
from llamax.ops import IGNORE_INDEX
from llamax.optim.loss_scale import LossScale, LossScaleState
from llamax.parallel.collectives import Axes
from llamax.parallel.rendezvous import Rendezvous
from llamax.tools.inspect.description import describe
from llamax.train import train


def float16(folder: Path) -> Config:
    """Six steps, at first with a loss scale that no gradient fits under."""
    dataset = tiny_run.make_dataset(folder)
    config = tiny_run.config(dataset, folder / "run", dtype="float16")
    optim = replace(config.optim, loss_scale=2.0**21, loss_scale_interval=2, most_skipped=0)
    return replace(config, optim=optim)


def test_a_resume_repeats_scale_and_weights(tmp_path: Path) -> None:
    config, folder = float16(tmp_path), tmp_path / "run"
    train(config, Rendezvous())
    records, hashes = tiny_run.log_of(folder), tiny_run.hashes(folder, tiny_run.STEPS)
    skipped = [record["overflowed_steps"] for record in records]
    scales = [record["loss_scale"] for record in records]
    assert 0 < skipped[-1] < 4, "some steps overflow, and some do not"
    scale, before, whole = 2.0**21, 0, 0
    for overflowed, found in zip(skipped, scales, strict=True):
        if overflowed > before:
            scale, whole = scale / 2, 0
        else:
            whole += 1
            scale *= 2 if whole % 2 == 0 else 1
        assert found == scale, "it falls with each overflow, and grows after two steps without"
        before = overflowed
    tiny_run.forget(folder, 3)
    train(config, Rendezvous())
    assert tiny_run.log_of(folder) == records
    assert tiny_run.hashes(folder, tiny_run.STEPS) == hashes
    assert ("loss scale", scales[-1]) in describe(folder)


def test_a_finished_run_that_is_started_again_stays_at_its_last_step(tmp_path: Path) -> None:
    config = float16(tmp_path)
    for _ in range(2):
        train(config, Rendezvous())
        beat = (tmp_path / "run" / HEARTBEATS_FOLDER / "rank-00000").read_text()
        assert json.loads(beat)["step"] == tiny_run.STEPS


def test_a_step_without_a_label_leaves_the_loss_scale() -> None:
    axes = Axes.solo()
    scaling = LossScale(LossScaleState(1024.0), torch.device("cpu"), 2)
    state = replace(training(build(TINY, axes, False).half(), axes, 1), loss_scale=scaling)
    empty = [b._replace(labels=torch.full_like(b.labels, IGNORE_INDEX)) for b in share(axes, 1)]
    found = [state.step(batches, number) for number, batches in enumerate((empty, empty), 1)]
    assert [step.result.loss_scale for step in found] == [
        LossScaleState(1024.0, 0, 1),
        LossScaleState(1024.0, 0, 2),
    ]


def test_an_overflow_leaves_the_update_after_it_as_it_would_be() -> None:
    """AdamW's bias correction counts updates, as under torch.amp.GradScaler."""

    def weights(*scales: float) -> list[torch.Tensor]:
        axes = Axes.solo()
        state = training(build(TINY, axes, False).half(), axes, 1)
        scaling = LossScale(LossScaleState(scales[0]), torch.device("cpu"), 2)
        state = replace(state, loss_scale=scaling)
        for number, scale in enumerate(scales, 1):
            scaling.scale.fill_(scale)
            state.step(share(axes, 1), number)
        return [run.tensor.clone() for run in state.optimizer.owned()]

    for got, want in zip(weights(2.0**30, 2.0**31, 1024.0), weights(1024.0), strict=True):
        assert torch.equal(got, want)
