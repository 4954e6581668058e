"""What a run opens, and in which order it reads its samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from support import tiny_run

from llamax.backends import choose
from llamax.config.schema import Config
from llamax.data.header import Header
from llamax.data.token_file import TokenWriter
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


def unlabelled(folder: Path, split: str, answers: int = 0) -> Config:
    """A run on documents with a mask; of one split only the last ``answers`` documents count."""
    folder.mkdir()
    dataset = tiny_run.make_dataset(folder)
    header = Header(tiny_run.describe(dataset, b"a tokenizer"), tiny_run.MODEL.vocab_size)
    for name in ("train", "validation"):
        with TokenWriter(dataset / f"{name}.tokens", header) as writer:
            for number in range(12):
                counts = name != split or number >= 12 - answers
                writer.add(np.arange(33), np.array([33]), 33, np.full(33, counts))
    return tiny_run.config(dataset, folder / "run")


@pytest.mark.parametrize("packing", ["concat", "padded", "best-fit"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_data_without_a_label_is_refused_at_the_start(
    tmp_path: Path, split: str, packing: Literal["concat", "padded", "best-fit"]
) -> None:
    """Before any step; the loss would be 0 / 0."""
    config = unlabelled(tmp_path / "data", split)
    config = replace(config, data=replace(config.data, packing=packing))
    said = rf"{split}\.tokens: no token of it counts in the loss; set data\.labels=all, or prepare"
    with pytest.raises(DataError, match=said):
        open_inputs(config)
    assert open_inputs(replace(config, data=replace(config.data, labels="all"))).training


def test_validation_with_its_labels_beyond_what_is_validated_is_refused(tmp_path: Path) -> None:
    config = unlabelled(tmp_path / "data", "validation", answers=2)
    config = replace(config, data=replace(config.data, packing="concat"))
    for batches, place in ((1, "its first batch"), (2, "its first 2 batches")):
        few = replace(config, run=replace(config.run, validate_batches=batches))
        with pytest.raises(
            DataError, match=rf"no token of {place} .*; raise run\.validate_batches"
        ):
            open_inputs(few)
    assert open_inputs(replace(config, run=replace(config.run, validate_batches=3))).validation
    assert open_inputs(replace(few, run=replace(few.run, validate_every=0))).training


@pytest.mark.parametrize(
    ("packing", "said"),
    [
        ("concat", "no token of it counts in the loss; prepare documents of two tokens or more"),
        ("best-fit", "no document has two tokens or more; prepare longer ones"),
    ],
)
def test_documents_of_one_token_have_no_label(
    tmp_path: Path, packing: Literal["concat", "best-fit"], said: str
) -> None:
    (tmp_path / "data").mkdir()
    dataset = tiny_run.make_dataset(tmp_path / "data")
    header = Header(tiny_run.describe(dataset, b"a tokenizer"), tiny_run.MODEL.vocab_size)
    with TokenWriter(dataset / "validation.tokens", header) as writer:
        writer.add(np.arange(40), np.ones(40, np.int64), 40)
    config = tiny_run.config(dataset, tmp_path / "run")
    config = replace(config, data=replace(config.data, packing=packing))
    with pytest.raises(DataError, match=said):
        open_inputs(config)


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
