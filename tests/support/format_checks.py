"""Checkpoints of other formats: a small model for all of them, and comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import support.checkpoints as worlds
from llamax.checkpoint.hf_folder import HfFolder
from llamax.config.load import dump_config
from llamax.config.model import ModelConfig
from llamax.config.schema import Config, RunConfig
from support.models import tiny


def llama(kv: int = 2, tied: bool = False, layers: int = 2, **fields: Any) -> ModelConfig:
    """Heads as wide as Meta's, a vocabulary that 8 ranks divide."""
    return tiny(
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=kv,
        vocab_size=40,
        tie_word_embeddings=tied,
        initializer_range=0.02,  # which no other format keeps
        **{"max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, **fields},
    )


def config_of(tmp_path: Path, model: ModelConfig) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(model.to_hub("bfloat16")))
    return str(path)


def saved(
    tmp_path: Path,
    model: ModelConfig,
    values: worlds.Wholes,
    tp: int = 2,
    dp: int = 1,
    step: int = 3,
) -> str:
    """A run's folder with one checkpoint."""
    ranks = worlds.world(model, tp, dp, True, values, values["model.norm.weight", "weight"].dtype)
    text = dump_config(Config(model=model, run=RunConfig(steps=9)))
    worlds.save(tmp_path / "run" / "checkpoints", model, ranks, step, config_text=text)
    return str(tmp_path / "run")


def check_hub(folder: Path, values: worlds.Wholes) -> None:
    source = HfFolder(folder)
    wanted = {name: value for (name, kind), value in values.items() if kind == "weight"}
    assert set(source.names()) == set(wanted)
    for name, value in wanted.items():
        found = source.read(name)
        assert found.dtype == value.dtype
        assert torch.equal(found, value), name


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert set(a) == set(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b
