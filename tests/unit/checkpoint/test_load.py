"""Loading: checkpoints of another model, dtypes that round, optimizer state of another shape."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import support.checkpoints as worlds
import torch
from safetensors.torch import save_file
from support.saving import refused

from llamax.checkpoint import Checkpoint, check_shapes, load_owned, load_weights
from llamax.checkpoint.build_model import default_dtype
from llamax.checkpoint.hf_folder import HfFolder
from llamax.model.llama import Llama

MODEL = worlds.llama()


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("has no model.layers.2.*which the model has", {"num_hidden_layers": 3}),
        ("has model.layers.1.*which the model lacks", {"num_hidden_layers": 1}),
        (r"q_proj.weight is \[24, 24\], the model's is \[12, 24\]", {"num_attention_heads": 2}),
        (r"embed_tokens.weight is \[37, 24\], the model's is \[38, 24\]", {"vocab_size": 38}),
        (r"embed_tokens.weight is \[37, 24\], the model's is \[37, 48\]", {"hidden_size": 48}),
        ("has lm_head.weight, which the model lacks", {"tie_word_embeddings": True}),
    ],
)
def test_another_model(folder: Path, match: str, change: dict[str, Any]) -> None:
    rank = worlds.world(replace(MODEL, **change), 1, 1, True, None)[0]
    source = Checkpoint(folder)
    refused(match, lambda: load_weights(source, rank.sharded))
    refused(match, lambda: check_shapes(source, rank.sharded))


def test_owned_runs_of_another_model(folder: Path) -> None:
    for change, match in (
        ({"num_hidden_layers": 3}, "has no model.layers.2"),
        ({"vocab_size": 38}, r"embed_tokens.weight is \[37, 24\], the model's is \[38, 24\]"),
        ({"hidden_size": 48}, r"embed_tokens.weight is \[37, 24\], the model's is \[37, 48\]"),
    ):
        rank = worlds.world(replace(MODEL, **change), 1, 1, True, None)[0]
        refused(match, lambda rank=rank: load_owned(Checkpoint(folder), rank.owned, rank.sharded))


def test_rounding_is_refused_unless_asked_for(folder: Path) -> None:
    rank = worlds.world(MODEL, 1, 1, True, None, torch.bfloat16)[0]
    source = Checkpoint(folder)
    refused(
        r"is float32; taking it as bfloat16 would round",
        lambda: load_weights(source, rank.sharded),
    )
    load_weights(source, rank.sharded, convert=True)
    wanted = worlds.wholes(MODEL)["model.norm.weight", "weight"].bfloat16()
    assert torch.equal(rank.parameters["model.norm.weight"], wanted)


def test_float32_takes_masters_and_narrow_weights_widen(tmp_path: Path) -> None:
    values = worlds.wholes(MODEL, torch.bfloat16)
    ranks = worlds.world(MODEL, 2, 1, True, values, torch.bfloat16)
    narrow = Checkpoint(worlds.save(tmp_path, MODEL, ranks))
    rank = worlds.world(MODEL, 1, 1, True, None)[0]
    worlds.load(narrow, [rank])
    assert torch.equal(rank.parameters["model.norm.weight"], values["model.norm.weight", "master"])
    back = worlds.world(MODEL, 1, 1, True, None, torch.bfloat16)[0]
    masters = [run for run in back.owned if run.kind == "master"]
    wide = worlds.save(tmp_path / "wide", MODEL, [rank])
    load_owned(Checkpoint(wide), masters, back.sharded)
    assert torch.equal(
        back.shares["master"]["model.norm.weight"], values["model.norm.weight", "master"]
    )


@pytest.mark.parametrize(
    ("stored", "on_cpu", "on_gpu"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.float64, torch.float32, torch.float32),
    ],
)
def test_models_are_loaded_in_the_type_of_their_files(
    tmp_path: Path, stored: torch.dtype, on_cpu: torch.dtype, on_gpu: torch.dtype
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL.to_hub("float32")))
    names = Llama(MODEL).sharded_parameters().hub_shapes()
    save_file(
        {name: torch.zeros(1, dtype=stored) for name in names}, tmp_path / "model.safetensors"
    )
    source = HfFolder(tmp_path)
    assert default_dtype(source, "cpu") == on_cpu
    assert default_dtype(source, "cuda:1") == on_gpu
