"""Checkpoints of NeMo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import support.checkpoints as worlds
import support.foreign_megatron as foreign_megatron
import torch
from support.format_checks import check_hub, config_of, llama

from llamax.cli.import_ import main as import_main


@pytest.mark.parametrize(
    ("kv", "options"),
    [
        (2, {"tp": 1}),
        (2, {"tp": 2}),
        (8, {"tp": 4, "pp": 2}),
        (2, {"tp": 2, "pp": 2, "core": True}),
        (2, {"tp": 2, "split_mlp": True, "pad": 24}),
        (2, {"tp": 2, "layout": "megatron"}),
        (8, {"tp": 2, "pp": 2, "layout": "megatron"}),
    ],
    ids=str,
)
def test_nemo(tmp_path: Path, kv: int, options: dict[str, Any]) -> None:
    model = llama(kv, layers=4)
    values = worlds.wholes(model, torch.bfloat16)
    folder = foreign_megatron.nemo(tmp_path / "in", values, model, **options)
    config = config_of(tmp_path, model)
    assert import_main([str(folder), "--out", str(tmp_path / "hub"), "--config", config]) == 0
    check_hub(tmp_path / "hub", values)
