"""The steps in which a run reports, validates and saves: at intervals, and at the ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support import tiny_run

from llamax.config.schema import Config
from llamax.parallel.rendezvous import Rendezvous
from llamax.train import train
from llamax.training.inputs import open_inputs
from llamax.training.resolve import resolve


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "data").mkdir()
    return tiny_run.config(tiny_run.make_dataset(tmp_path / "data"), tmp_path / "run")


def trained(config: Config) -> tuple[list[int], list[int], list[int]]:
    """The steps that a run reports, validates and saves."""
    train(config, Rendezvous())
    folder = Path(config.run.folder)
    records = tiny_run.log_of(folder)
    validated = [record["step"] for record in records if "validation_loss" in record]
    saved = sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))
    return [record["step"] for record in records], validated, saved


def test_a_run_ends_in_a_record_a_validation_and_a_checkpoint(config: Config) -> None:
    run = replace(config.run, steps=7, log_every=5, validate_every=3)
    every_other = replace(config.checkpoint, every=2)
    found = trained(replace(config, run=run, checkpoint=every_other))
    assert found == ([3, 5, 6, 7], [3, 6, 7], [2, 4, 6, 7])


@pytest.mark.parametrize("batch", [4, 5, 40])
def test_a_run_saves_and_validates_where_an_epoch_ends(config: Config, batch: int) -> None:
    """Of 15 samples: batches that divide an epoch, that do not, and that hold several epochs."""
    config = replace(
        config,
        data=replace(config.data, global_batch=batch, micro_batch=batch),
        checkpoint=replace(config.checkpoint, every=0, each_epoch=True),
        run=replace(config.run, epochs=2, validate_every=0, validate_each_epoch=True),
    )
    samples = len(open_inputs(config).training)
    assert samples == 15
    run = resolve(config, 1, samples)
    ends = [step for step in range(1, run.steps + 1) if step * batch % samples < batch]
    assert run.epoch_ends == (*ends,)
    _, validated, saved = trained(config)
    assert saved == validated == ends
