"""``llamax inspect`` of checkpoints and Hugging Face folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import support.checkpoints as worlds
import torch
from support.saving import saved

from llamax.checkpoint.consolidate import consolidate
from llamax.checkpoint.shard_hf import shard
from llamax.cli import inspect as inspection
from llamax.runtime.errors import CheckpointError
from llamax.tools.inspect.description import describe, table


def rows(path: Path, verify: bool = False) -> dict[str, str]:
    return {label: str(value) for label, value in describe(path, verify)}


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path, worlds.llama(), torch.bfloat16, 2)
    hub = consolidate(tmp_path, tmp_path / "hub")
    found = rows(folder, verify=True)
    assert found["step"] == "3"
    assert found["saved on"].startswith("tensor 2 x data 2, llamax ")
    assert found["model"] == (
        "Llama of 11.1K parameters: 2 layers, hidden 24, feed-forward 40, heads 4/2, vocabulary 37"
    )
    assert "master float32 x 21" in found["tensors"]
    assert found["consumed sequences"] == "24"
    assert found["files"].startswith("8, ")
    assert found["verified"] == "checksums of all 8 files"
    assert "verified" not in rows(folder)
    assert rows(tmp_path)["checkpoints"] == "step-00000003"
    assert rows(hub)["tensors"] == "weight bfloat16 x 21"
    assert rows(hub / "model.safetensors")["tensors"] == "tensor bfloat16 x 21"
    for one in (hub, hub / "model.safetensors"):
        assert rows(one, verify=True)["verified"].startswith("nothing: ")
        assert "verified" not in rows(one)
    assert inspection.main([str(hub)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({line.index("  ") for line in lines if "Hugging Face" in line}) == 1
    assert lines[0].startswith("Hugging Face  ")
    with pytest.raises(CheckpointError, match=r"there is no .*nothing; check the path"):
        describe(tmp_path / "nothing")
    (tmp_path / "else").mkdir()
    with pytest.raises(
        CheckpointError, match=r"is not a checkpoint, run, .* read by llamax import"
    ):
        describe(tmp_path / "else")
    with pytest.raises(
        CheckpointError, match=r"it is not a Hugging Face folder; .* llamax consolid"
    ):
        shard(folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"no complete .*hub \(a Hugging Face folder\)"):
        consolidate(hub, tmp_path / "out")
    os.truncate(next(folder.glob("weights*")), 10)
    with pytest.raises(CheckpointError, match="has 10 bytes"):
        rows(folder)


def test_keys_of_the_state_are_safe_for_a_terminal() -> None:
    """As values are; a key is a label of the table."""
    shown = table([("step", 1), ("a\x1b[2J\u202e\nverified", "x\x9b"), ("k" * 5000, 2)])
    lines = shown.split("\n")
    assert [line.split("  ")[0].strip() for line in lines[:2]] == [
        "step",
        r"a\x1b[2J\u202e\x0averified",
    ]
    assert lines[1].endswith(r"x\x9b")
    assert max(map(len, lines)) < 60
