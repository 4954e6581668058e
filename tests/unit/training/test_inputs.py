"""What a run opens, and in which order it reads its samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import tiny_run

from llamax.backends import choose
from llamax.data.token_file import Header, TokenWriter
from llamax.parallel.collectives import Axes
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import DataError
from llamax.training.inputs import open_inputs
from llamax.training.resolve import resolve
from llamax.training.setup import loaders, prepare


def test_validation_samples_are_made_by_runs_that_validate_alone(tmp_path: Path) -> None:
    """The only document that was held out is too long, and would be dropped."""
    (tmp_path / "data").mkdir()
    dataset = tiny_run.make_dataset(tmp_path / "data")
    header = Header(tiny_run.describe(dataset, b"a tokenizer"), tiny_run.MODEL.vocab_size)
    with TokenWriter(dataset / "validation.tokens", header) as writer:
        writer.add(np.arange(60), np.array([60]), 60)
    config = tiny_run.config(dataset, tmp_path / "run")
    config = replace(config, data=replace(config.data, packing="best-fit", too_long="drop"))
    with pytest.raises(DataError, match=r"validation\.tokens: no document is left"):
        open_inputs(config)
    assert open_inputs(replace(config, run=replace(config.run, validate_every=0))).training


def test_validation_has_every_sample_once_in_its_order(tmp_path: Path) -> None:
    """Whatever the seed; empty rows fill the last batch."""
    (tmp_path / "data").mkdir()
    config = tiny_run.config(tiny_run.make_dataset(tmp_path / "data"), tmp_path / "run")
    config = replace(config, run=replace(config.run, seed=5))
    inputs = open_inputs(config)
    assert inputs.validation is not None
    job = prepare(resolve(config, 1), choose("cpu", Rendezvous()), Axes.solo(), inputs)
    training, validation = loaders(job)
    job.saver.close()
    assert validation is not None
    count = len(inputs.validation)
    order = validation.order(np.arange(validation.steps * config.data.global_batch))
    assert order.tolist() == [*range(count), *[-1] * (len(order) - count)]
    assert training.order(np.arange(4)).tolist() != [0, 1, 2, 3]
