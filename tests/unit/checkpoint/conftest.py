"""Fixtures of checkpoint tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import support.checkpoints as worlds

MODEL = worlds.llama()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        ranks = worlds.world(MODEL, 2, 1, True, worlds.wholes(MODEL))
        worlds.save(folder, MODEL, ranks, step)
    return folder


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    """Step 2 of a run that holds an intact step 1 as well."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run" / "step-00000002"


@pytest.fixture
def rank() -> worlds.Rank:
    return worlds.world(MODEL, 1, 1, True, worlds.wholes(MODEL))[0]
