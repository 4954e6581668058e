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


LAYERS_ALONE = """
import torch, torch_xla
from llamax.config.model import ModelConfig
from llamax.model.llama import Llama

small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
config = ModelConfig(**small, num_attention_heads=4, num_key_value_heads=2)
ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
found = []
for device in ("cpu", torch_xla.device()):
    model = Llama(config).init(0).to(device)
    loss, count = model.loss(ids.to(device), ids.roll(-1, 1).to(device))
    loss.backward()
    found.append([loss.cpu(), *(weight.grad.cpu() for weight in model.parameters())])
for mine, theirs in zip(*found, strict=True):
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
"""


def test_a_model_of_a_program_that_sets_nothing() -> None:
    """llamax as a library, on the device as torch-neuronx leaves it."""
    variables = {"PJRT_DEVICE": "CPU", "XLA_DISABLE_FUNCTIONALIZATION": "1"}
    words = [sys.executable, "-c", LAYERS_ALONE]
    done = subprocess.run(words, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
