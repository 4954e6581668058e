"""A configuration that ties the head, beside a head with other values: the head is kept.

transformers 5 is the judge: it ties the two only if their values are equal, or if there is one.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import support.checkpoints as worlds
import support.foreign as foreign
import support.foreign_megatron as megatron
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.adapters import hub_folder
from support.format_checks import config_of, llama
from support.models import LLAMA2

from llamax.checkpoint import load_weights
from llamax.checkpoint.consolidate import consolidate
from llamax.checkpoint.formats.convert import import_checkpoint
from llamax.checkpoint.formats.export import export
from llamax.checkpoint.hf_folder import HfFolder
from llamax.checkpoint.merge import merge
from llamax.checkpoint.shard_hf import shard
from llamax.config.model import ModelConfig
from llamax.model.llama import Llama
from llamax.runtime.errors import CheckpointError

peft = pytest.importorskip("peft")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
IDS = torch.tensor([[1, 5, 60, 7, 33]])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder whose config.json ties, and whose files do not."""
    folder = hub_folder(tmp_path / "base", replace(LLAMA2, tie_word_embeddings=True))
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(3)
    weights[HEAD] = weights[EMBEDDING] + 0.3 * torch.randn_like(weights[EMBEDDING])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def test_a_head_of_other_values_is_kept_by_every_reader(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits(base)
    with caplog.at_level(logging.WARNING, "llamax"):
        source = HfFolder(base)
    assert "config.json ties lm_head to the embedding" in caplog.text
    assert HEAD in source.names()
    assert source.model["tie_word_embeddings"] is False
    model = Llama(ModelConfig.from_hub(source.model))
    load_weights(source, model.sharded_parameters())
    with torch.no_grad():
        assert torch.allclose(model(IDS), expected, atol=1e-5)
    shard(base, tmp_path / "sharded", 2)
    consolidate(tmp_path / "sharded", tmp_path / "back")
    assert torch.equal(logits(tmp_path / "back"), expected)
    export(tmp_path / "sharded", tmp_path / "meta", to="meta")
    config = str(tmp_path / "back" / "config.json")
    import_checkpoint(tmp_path / "meta", tmp_path / "from-meta", config=config)
    assert torch.equal(logits(tmp_path / "from-meta"), expected)
    tuned = peft.get_peft_model(
        transformers.LlamaForCausalLM.from_pretrained(base),
        peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]),
    )
    tuned.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert torch.allclose(logits(tmp_path / "merged"), expected, atol=1e-5)


def test_equal_heads_are_tied_and_a_head_alone_is_the_embedding(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = load_file(base / "model.safetensors")
    equal = {**weights, HEAD: weights[EMBEDDING].clone()}
    save_file(equal, base / "model.safetensors", metadata={"format": "pt"})
    expected = logits(base)
    tied = HfFolder(base)
    assert HEAD not in tied.names()
    assert tied.model["tie_word_embeddings"] is True

    # safetensors.torch.save_model keeps the first name of a shared tensor: lm_head.weight
    alone = shutil.copytree(base, tmp_path / "alone")
    del equal[EMBEDDING]
    save_file(equal, alone / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(alone), expected)
    source = HfFolder(alone)
    assert HEAD not in source.names()
    assert torch.equal(source.read(EMBEDDING), weights[EMBEDDING])
    assert not caplog.records


def test_a_head_of_another_type_is_another_head(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights[HEAD] = weights[EMBEDDING].bfloat16()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert HEAD in HfFolder(base).names()


def test_a_missing_head_is_refused(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "base", replace(LLAMA2, tie_word_embeddings=False))
    weights = load_file(folder / "model.safetensors")
    del weights[HEAD]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no lm_head.weight, and its config.json does"):
        shard(folder, tmp_path / "out")


@pytest.mark.parametrize("format", ["nxd", "nemo"])
def test_a_head_of_other_values_of_another_trainer_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, format: str
) -> None:
    untied, tied = llama(2, False), llama(2, True)
    values = worlds.wholes(untied, torch.bfloat16)
    writer = {"nxd": foreign.nxd, "nemo": megatron.nemo}[format]
    writer(tmp_path / "in", values, untied)
    config = config_of(tmp_path, tied)
    with caplog.at_level(logging.WARNING, "llamax"):
        import_checkpoint(tmp_path / "in", tmp_path / "hub", config=config, format=format)
    assert "ties lm_head to the embedding" in caplog.text
    source = HfFolder(tmp_path / "hub")
    assert torch.equal(source.read(HEAD), values[HEAD, "weight"])
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["tie_word_embeddings"] is (
        False
    )
