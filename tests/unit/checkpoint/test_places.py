"""What a run names is found from any folder, and where a whole tree was moved."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
from support.instruction import llama2_tokenizer, prepare, sums, write_rows
from support.models import DECIDED

from llamax.checkpoint.build_model import load_tuned
from llamax.checkpoint.consolidate import consolidate
from llamax.checkpoint.merge import merge
from llamax.checkpoint.places import find_folder
from llamax.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    FinetuneConfig,
    OptimConfig,
    RunConfig,
)
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.inference.engine import open_model
from llamax.parallel.rendezvous import Rendezvous
from llamax.train import train


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with a run and a run of adapters that name their folders by relative paths."""
    home = tmp_path / "home"
    home.mkdir()
    tokenizer = llama2_tokenizer(home)
    rows = write_rows(home / "rows.jsonl", sums(30, 10))
    prepare(home / "data", rows, "--template", "usr-bot", "--tokenizer", tokenizer)
    monkeypatch.chdir(home)
    cfg = Config(
        model=DECIDED,
        optim=OptimConfig(lr=1e-3),
        data=DataConfig(path="data", sequence_length=64, global_batch=2),
        checkpoint=CheckpointConfig(),
        run=RunConfig(folder="run", steps=1, progress="off", threads=1),
    )
    train(cfg, Rendezvous())
    consolidate("run", "base")
    tuned = dataclasses.replace(
        cfg,
        checkpoint=CheckpointConfig(init_from="base"),
        finetune=FinetuneConfig(method="lora", r=2),
        run=dataclasses.replace(cfg.run, folder="adapters"),
    )
    train(tuned, Rendezvous())
    return home


def test_a_tokenizer_and_a_base_are_found_from_any_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "data").mkdir(parents=True)  # of another run
    monkeypatch.chdir(elsewhere)
    expected = load_tokenizer(home / "tokenizer.model").fingerprint
    assert load_tokenizer(consolidate(home / "run", "whole")).fingerprint == expected
    assert load_tokenizer(merge(home / "adapters", "merged")).fingerprint == expected
    for folder in ("run", "adapters"):
        assert open_model(home / folder).tokenizer.fingerprint == expected
    load_tuned(home / "adapters")


def test_a_moved_tree_is_searched(home: Path, tmp_path: Path) -> None:
    moved = shutil.move(home, tmp_path / "moved")
    os.chdir(tmp_path)
    expected = load_tokenizer(moved / "tokenizer.model").fingerprint
    for folder in ("run", "adapters"):
        assert open_model(moved / folder).tokenizer.fingerprint == expected
    assert load_tokenizer(merge(moved / "adapters", "merged")).fingerprint == expected


def test_a_folder_that_is_nowhere_is_not_found(tmp_path: Path) -> None:
    assert find_folder("data", tmp_path / "run" / "step-1") is None
    assert find_folder("/", tmp_path) == Path("/")
    assert find_folder("/nowhere/at/all", tmp_path / "run") is None
