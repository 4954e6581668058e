"""A run is the same where torch-xla is set up as torch-neuronx sets it up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch_xla", reason="needs torch-xla: `make test` runs this in .venv-xla")

from support.tiny_run import config, log_of, write

TOLERANCE = 2e-6


def trained(data: Path, folder: Path, backend: str, **variables: str) -> list[dict[str, object]]:
    """The records of a run alone, in a process with these variables."""
    cfg = write(config(data, folder, backend=backend), Path(f"{folder}.toml"))
    words = [sys.executable, "-m", "llamax.train", "--config", str(cfg)]
    done = subprocess.run(words, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return log_of(folder)


def test_views_without_functionalization(data: Path, tmp_path: Path) -> None:
    """torch-neuronx switches functionalization off, and torch-xla then splits wrongly."""
    found = trained(data, tmp_path / "xla", "xla", XLA_DISABLE_FUNCTIONALIZATION="1")
    expected = trained(data, tmp_path / "cpu", "cpu")
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for mine, theirs in zip(found, expected, strict=True):
        for key, value in theirs.items():
            assert mine[key] == pytest.approx(value, rel=TOLERANCE), (mine["step"], key)
