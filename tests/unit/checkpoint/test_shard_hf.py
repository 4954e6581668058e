"""Hugging Face folders as sources, and as checkpoints cut for a mesh."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import support.checkpoints as worlds
import torch
import transformers
from support.adapters import hub_folder
from support.instruction import llama3_tokenizer
from support.saving import saved

from llamax.checkpoint import Checkpoint, load_weights
from llamax.checkpoint.consolidate import consolidate
from llamax.checkpoint.hf_folder import (
    HfFolder,
    open_source,
)
from llamax.checkpoint.shard_hf import shard
from llamax.cli.shard import main as shard_main
from llamax.config.model import ModelConfig
from llamax.inference.engine import tokenizer_of
from llamax.runtime.errors import CheckpointError, ConfigError


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_shard_is_the_reverse_of_consolidate(tmp_path: Path, tensor: int) -> None:
    model = worlds.llama(kv=2)
    saved(tmp_path, model, torch.bfloat16, 2)
    hub = consolidate(tmp_path, tmp_path / "hub", max_shard_size=4000)
    again = Checkpoint(shard(hub, tmp_path / "again", tensor))
    again.verify()
    assert again.manifest.mesh["tensor"] == tensor
    assert len(again.manifest.files) == tensor
    twice = consolidate(tmp_path / "again", tmp_path / "twice")
    first = HfFolder(hub)
    assert sorted(first.names()) == sorted(HfFolder(twice).names())
    for name in first.names():
        assert torch.equal(first.read(name), HfFolder(twice).read(name))
        assert torch.equal(first.read(name), worlds.wholes(model, torch.bfloat16)[name, "weight"])
    for rank in range(4):
        mine = worlds.world(model, 4, 1, True, None, torch.bfloat16)[rank]
        load_weights(again, mine.sharded)
        wanted = worlds.world(model, 4, 1, True, worlds.wholes(model, torch.bfloat16),
                              torch.bfloat16)[rank]  # fmt: skip
        for name, value in mine.parameters.items():
            assert torch.equal(value, wanted.parameters[name])


def test_a_checkpoint_finds_the_tokenizer_of_the_folder_it_was_cut_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = llama3_tokenizer(tmp_path / "hub", "{{ messages }}")
    hub_folder(hub, worlds.llama(vocabulary=507))
    monkeypatch.chdir(tmp_path)
    again = shard("hub", "again", 2)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    twice = consolidate(tmp_path / again, "twice")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (twice / name).read_bytes() == (hub / name).read_bytes()
    assert tokenizer_of(open_source(tmp_path / again), 507).path == hub / "tokenizer.json"
    (hub / "tokenizer.json").unlink()
    assert not (consolidate(tmp_path / again, "third") / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("dtype", "tied", "limit"),
    [(torch.float32, False, "1GB"), (torch.bfloat16, True, "20KB"), (torch.float16, False, "20KB")],
)
def test_folders_that_transformers_saved(
    tmp_path: Path, dtype: torch.dtype, tied: bool, limit: str
) -> None:
    config = transformers.LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=37, tie_word_embeddings=tied,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).to(dtype)
    theirs.save_pretrained(tmp_path / "hub", max_shard_size=limit)
    files = [*(tmp_path / "hub").glob("*.safetensors")]
    assert (len(files) == 1) == (limit == "1GB")
    source = Checkpoint(shard(tmp_path / "hub", tmp_path / "out", 2))
    assert ("lm_head.weight" in source.names()) == (not tied)
    for name in source.names():
        assert torch.equal(source.read(name), theirs.state_dict()[name])
    assert ModelConfig.from_hub(source.model).rms_norm_eps == 1e-6


def test_boxes_of_a_source(tmp_path: Path) -> None:
    model = worlds.llama()
    source = Checkpoint(saved(tmp_path, model))
    hub = HfFolder(consolidate(tmp_path, tmp_path / "hub"))
    for name in ("model.layers.0.mlp.down_proj.weight", "lm_head.weight"):
        value = worlds.wholes(model)[name, "weight"]
        for reader in (source, hub):
            assert torch.equal(reader.read(name, dim=0, start=3, stop=20), value[3:20])
            assert torch.equal(reader.read(name, dim=1, start=5, stop=9), value[:, 5:9])
            assert torch.equal(reader.read(name, dim=1, start=5), value[:, 5:])
    moment = worlds.wholes(model)["lm_head.weight", "exp_avg"]
    assert torch.equal(source.read("lm_head.weight", "exp_avg", 1, 2, 4), moment[:, 2:4])


def test_a_source_of_either_kind(tmp_path: Path) -> None:
    folder = saved(tmp_path, worlds.llama())
    hub = consolidate(tmp_path, tmp_path / "hub")
    assert isinstance(open_source(hub), HfFolder)
    assert [open_source(path).folder for path in (folder, tmp_path)] == [folder, folder]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty"):
        open_source(tmp_path / "empty")


def test_a_degree_that_does_not_cut_the_model(tmp_path: Path) -> None:
    saved(tmp_path, worlds.llama())
    hub = consolidate(tmp_path, tmp_path / "hub")
    with pytest.raises(ConfigError, match=r"^`tensor=3` does not cut .* parts; use 1( or \d)+$"):
        shard(hub, tmp_path / "out", 3)
    with pytest.raises(ConfigError, match="--tensor=0 is below 1"):
        shard_main([str(hub), "--out", str(tmp_path / "out"), "--tensor", "0"])
    config = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(
        CheckpointError, match=r"num_hidden_layers=3, but the files hold tensors of 2"
    ):
        shard(hub, tmp_path / "out", 2)
