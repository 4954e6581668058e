"""What a run opens: no more than it uses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import tiny_run

from llamax.data.token_file import Header, TokenWriter
from llamax.runtime.errors import DataError
from llamax.training.inputs import open_inputs


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
