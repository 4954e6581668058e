"""Checkpoints of NeMo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import support.checkpoints as worlds
import support.foreign as foreign
import torch

from llamax.checkpoint.hf_folder import HubFolder
from llamax.cli.import_ import main as import_main
from llamax.config.model import ModelConfig


def llama(kv: int = 2, tied: bool = False, layers: int = 2, **fields: Any) -> ModelConfig:
    """Heads as wide as Meta's, a vocabulary that 8 ranks divide."""
    return ModelConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=kv,
        vocab_size=40,
        tie_word_embeddings=tied,
        **{"max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, **fields},
    )


def config_of(tmp_path: Path, model: ModelConfig) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(model.to_hub("bfloat16")))
    return str(path)


def check_hub(folder: Path, values: worlds.Wholes) -> None:
    source = HubFolder(folder)
    wanted = {name: value for (name, kind), value in values.items() if kind == "weight"}
    assert set(source.names()) == set(wanted)
    for name, value in wanted.items():
        found = source.read(name)
        assert found.dtype == value.dtype
        assert torch.equal(found, value), name


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
    folder = foreign.nemo(tmp_path / "in", values, model, **options)
    config = config_of(tmp_path, model)
    assert import_main([str(folder), "--out", str(tmp_path / "hub"), "--config", config]) == 0
    check_hub(tmp_path / "hub", values)
