"""Checkpoints of optimum-neuron."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import support.checkpoints as worlds
import support.foreign as foreign
import torch

from llamax.checkpoint.formats.convert import open_folder
from llamax.checkpoint.hf_folder import HubFolder
from llamax.cli.import_ import main as import_main
from llamax.config.model import ModelConfig
from llamax.runtime.errors import CheckpointError


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


def check_hub(folder: Path, values: worlds.Wholes) -> None:
    source = HubFolder(folder)
    wanted = {name: value for (name, kind), value in values.items() if kind == "weight"}
    assert set(source.names()) == set(wanted)
    for name, value in wanted.items():
        found = source.read(name)
        assert found.dtype == value.dtype
        assert torch.equal(found, value), name


@pytest.mark.parametrize(
    ("tp", "copies", "pp", "xser"), [(8, 4, 1, False), (4, 2, 2, True), (2, 1, 1, False)]
)
def test_optimum(tmp_path: Path, tp: int, copies: int, pp: int, xser: bool) -> None:
    model = llama(2)
    values = worlds.wholes(model, torch.float32)
    folder = foreign.optimum(tmp_path / "in", values, model, tp, copies, pp, xser)
    for given in (folder, folder / "shards"):
        out = tmp_path / f"hub-{given.name}"
        assert import_main([str(given), "--out", str(out)]) == 0
        check_hub(out, values)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            ("parameters", "model.layers.0.self_attn.o_proj.weight", "partition_dim"),
            "cut along dim 0, .* dim 1",
        ),
        (
            ("parameters", "model.norm.weight", "tensor_model_parallel"),
            "cut along dim None, .* no dim",
        ),
        (("kv",), "repeated 3 times, the shards hold 4"),
    ],
)
def test_optimum_metadata_that_disagrees(
    tmp_path: Path, change: tuple[str, ...], told: str
) -> None:
    model = llama(2)
    folder = foreign.optimum(tmp_path / "in", worlds.wholes(model), model, 8, 4)
    path = folder / "shards" / "mp_metadata_pp_rank_0.json"
    held = json.loads(path.read_text())
    if change == ("kv",):
        held["model_weight_transformation_specs"][1]["specs"][0][1]["kv_size_multiplier"] = 3
    else:
        held[change[0]][change[1]][change[2]] = True if "norm" in change[1] else 0
    path.write_text(json.dumps(held))
    with pytest.raises(CheckpointError, match=told):
        open_folder(folder, "auto", "")
