"""The tokens that a run has consumed, which records, plots and model cards give."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import tiny_run

from llamax.config.schema import Config
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import CheckpointError
from llamax.train import train


@pytest.fixture
def run(tmp_path: Path) -> Config:
    (tmp_path / "data").mkdir()
    return tiny_run.config(tiny_run.make_dataset(tmp_path / "data"), tmp_path / "run")


def trained(config: Config, steps: int, length: int) -> list[int]:
    """Train up to ``steps`` with samples of ``length``; the tokens of all records."""
    data = replace(config.data, sequence_length=length)
    train(replace(config, data=data, run=replace(config.run, steps=steps)), Rendezvous())
    return [record["consumed_tokens"] for record in tiny_run.log_of(Path(config.run.folder))]


def rewrite_state(config: Config, step: int, **changes: Any) -> None:
    """Change the state in a checkpoint; None takes a value away."""
    folder = Path(config.run.folder) / f"checkpoints/step-{step:08d}"
    manifest = json.loads((folder / "manifest.json").read_text())
    known = {**manifest["state"], **changes}
    manifest["state"] = {name: value for name, value in known.items() if value is not None}
    text = json.dumps(manifest)
    (folder / "manifest.json").write_text(text)
    (folder / "done").write_text(hashlib.sha256(text.encode()).hexdigest())


def test_samples_of_another_length_are_added(run: Config) -> None:
    """Of 4 samples in a step, as a run has that goes on with a longer context."""
    assert trained(run, 2, 16) == [64, 128]
    assert trained(run, 4, 32) == [64, 128, 256, 384]
    assert trained(run, 5, 8) == [64, 128, 256, 384, 416]


def test_a_checkpoint_without_the_number_had_samples_of_one_length(run: Config) -> None:
    trained(run, 2, 16)
    rewrite_state(run, 2, consumed_tokens=None)
    assert trained(run, 3, 16) == [64, 128, 192]


@pytest.mark.parametrize("found", [-1, 1.5, "128", 2**63])
def test_a_damaged_number_is_one_line(run: Config, found: object) -> None:
    trained(run, 1, 16)
    rewrite_state(run, 1, consumed_tokens=found)
    with pytest.raises(CheckpointError, match=r"has consumed_tokens=.*, which is no number"):
        trained(run, 2, 16)
