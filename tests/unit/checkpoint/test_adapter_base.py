"""The fingerprint of the base of an adapter, and its factors as they are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from support.adapters import hub_folder
from support.models import LLAMA2, LLAMA3

from llamax.checkpoint.load import load_weights
from llamax.checkpoint.peft import fingerprint
from llamax.config.schema import FinetuneConfig
from llamax.model import lora


def test_a_fingerprint_survives_precision_and_a_changed_weight_does_not(tmp_path: Path) -> None:
    base = hub_folder(tmp_path / "base", LLAMA3)
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    expected = fingerprint(adapters_source(base))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    assert fingerprint(adapters_source(tmp_path / "narrow")) == expected
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.1)
    model.save_pretrained(tmp_path / "tuned")
    assert fingerprint(adapters_source(tmp_path / "tuned")) != expected


def adapters_source(folder: Path) -> Any:
    from llamax.checkpoint.hf_folder import open_source

    return open_source(folder)


def test_factors_are_drawn_alike_on_every_mesh(tmp_path: Path) -> None:
    """A is uniform within 1/sqrt(in), as PEFT draws it, and B zero."""
    base = hub_folder(tmp_path / "base", LLAMA2)
    from llamax.model.llama import Llama

    model = Llama(LLAMA2)
    load_weights(adapters_source(base), model.sharded_parameters())
    lora.adapt(model, FinetuneConfig(r=8), torch.empty(0))
    lora.init(model, 3)
    a = model.get_parameter("model.layers.0.mlp.down_proj.lora_A.weight")
    assert 0.9 / 48**0.5 < a.abs().max() <= 1 / 48**0.5
    assert not model.get_parameter("model.layers.0.mlp.down_proj.lora_B.weight").any()
