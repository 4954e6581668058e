"""Every kind of LoRA adapter that PEFT saves of a Llama: peft computes the expected logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.adapters import hub_folder
from support.models import TINY

from llamax.checkpoint.build_model import load_tuned
from llamax.checkpoint.hf_folder import HfFolder, open_source
from llamax.checkpoint.merge import merge
from llamax.checkpoint.merged import Merged
from llamax.checkpoint.peft import PeftFolder, find_base_folder, open_adapter
from llamax.checkpoint.shard_hf import shard
from llamax.runtime.errors import CheckpointError
from llamax.runtime.hub_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llamax.tools.inspect.description import describe

peft = pytest.importorskip("peft", reason="peft, the judge of LoRA, is not installed")

KINDS: dict[str, dict[str, Any]] = {
    "layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 0},
    "layer names": {
        "target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": "layers",
    },
    "pattern": {"target_modules": r"model\.layers\.0\.self_attn\.(q|v)_proj"},
    "pattern of both": {"target_modules": r".*\.(0\.mlp\.up|1\.self_attn\.o)_proj"},
    "full names": {"target_modules": ["layers.1.self_attn.q_proj", "layers.0.mlp.gate_proj"]},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["layers.0.mlp.up_proj"]},
    "excluded pattern": {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*0.*q_.*"},
    "ranks": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 5, r"layers\.1\..*down_proj": 1},
        "alpha_pattern": {"model.layers.0.mlp.up_proj": 31, "o_proj": 2.5},
    },
    "ranks rslora": {
        "target_modules": ["q_proj", "v_proj"], "use_rslora": True,
        "rank_pattern": {"v_proj": 4}, "alpha_pattern": {"^model.layers.1.self_attn.v_proj": 9},
    },
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "dora head rslora": {
        "target_modules": ["q_proj", "lm_head"], "use_dora": True, "use_rslora": True,
        "layers_to_transform": None,
    },
    "bias": {"target_modules": ["q_proj"], "bias": "all"},
    "bias of lora": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "embedding and head": {"target_modules": ["lm_head", "embed_tokens"], "use_rslora": True},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved both": {"target_modules": "all-linear", "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "saved mlp": {"target_modules": ["q_proj"], "modules_to_save": ["0.mlp", "v_proj"]},
    "saved target": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["v_proj"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [9, 3]},
    "tokens of head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [4]}},
    "tokens of both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [4]},
    },
    "same tokens": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [3, 9]},
    },
    "tying saved": {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "tying tokens": {
        "target_modules": ["q_proj"], "trainable_token_indices": [3], "ensure_weight_tying": True,
    },
    "tying head": {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True},
    "tying embedding": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
}  # fmt: skip
IDS = torch.tensor([[1, 3, 9, 4, 60, 33], [9, 9, 2, 3, 0, 5]])


def saved(folder: Path, tied: bool, settings: dict[str, Any]) -> torch.Tensor:
    """Save an adapter whose tensors are all random; the logits that peft computes from the file."""
    base = hub_folder(folder / "base", replace(TINY, tie_word_embeddings=tied))
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_alpha=7, task_type="CAUSAL_LM", **settings)
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens")):
            noise = torch.empty_like(parameter).normal_(0, 0.2, generator=generator)
            parameter.data.add_(noise)
            if "magnitude" in name:
                parameter.data.abs_()
    tuned.save_pretrained(folder / "adapter")
    plain = transformers.LlamaForCausalLM.from_pretrained(base)
    loaded = peft.PeftModel.from_pretrained(plain, folder / "adapter").eval()
    with torch.no_grad():
        return loaded(IDS).logits


def equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 2e-5 * expected.abs().max())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_peft(tmp_path: Path, kind: str, tied: bool) -> None:
    expected = saved(tmp_path, tied, KINDS[kind])
    with torch.no_grad():
        assert equal(load_tuned(tmp_path / "adapter")(IDS), expected)
        merge(tmp_path / "adapter", tmp_path / "merged")
        merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
        assert equal(merged(IDS).logits, expected)
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert not equal(base(IDS).logits, expected)


def test_shares_of_tensor_ranks_are_cut_from_merged_weights(tmp_path: Path) -> None:
    """Runs that begin and end inside rows, as those of row-parallel layers do."""
    saved(tmp_path, True, KINDS["dora head rslora"] | {"target_modules": "all-linear"})
    source, info = open_adapter(tmp_path / "adapter")
    merged = Merged(open_source(find_base_folder(tmp_path, info)), source, info)
    whole = {name: merged.read(name) for name in merged.names()}
    for name, tensor in whole.items():
        if tensor.dim() == 2:
            columns = tensor.shape[1] // 2
            assert torch.equal(merged.read(name, dim=1, start=columns), tensor[:, columns:]), name
            assert torch.equal(merged.read(name, dim=0, start=3, stop=7), tensor[3:7]), name


def test_kinds_that_are_not_computed_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, False, {"target_modules": ["embed_tokens"], "use_dora": True})
    adapter, line = tmp_path / "adapter", "use_dora=True on model.embed_tokens is not supported"
    for reader in (load_tuned, lambda folder: merge(folder, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=line):
            reader(adapter)
    path = adapter / ADAPTER_CONFIG
    changed = {"use_dora": False, "trainable_token_indices": [3]}  # which PEFT refuses too
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(CheckpointError, match="together with LoRA factors of model"):
        load_tuned(adapter)


def test_adapters_are_no_model_to_train_or_shard(tmp_path: Path) -> None:
    saved(tmp_path, False, KINDS["ranks"])
    for reader in (open_source, HfFolder, lambda folder: shard(folder, tmp_path / "out")):
        with pytest.raises(CheckpointError, match="holds adapters, not a model; merge them with"):
            reader(tmp_path / "adapter")
    rows = dict(describe(tmp_path / "adapter"))
    assert rows["PEFT settings"] == "rank_pattern, alpha_pattern"


OVERLAPPING = {"layers.0.self_attn.k_proj": 64, "k_proj": 8}


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (OVERLAPPING, True),
        (dict.fromkeys(OVERLAPPING, 8), False),
        ({"layers.0.self_attn.k_proj": 64, "v_proj": 8}, False),
    ],
    ids=["two values", "one value", "apart"],
)
def test_alphas_that_peft_may_have_exchanged_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, patterns: dict[str, int], says: bool
) -> None:
    """PEFT sorts the keys on saving: findings/peft-pattern-order.sh."""
    settings = {"target_modules": ["k_proj", "v_proj"], "alpha_pattern": patterns}
    expected = saved(tmp_path, False, settings)
    with torch.no_grad():
        assert equal(load_tuned(tmp_path / "adapter")(IDS), expected)
    line = (
        "keys of alpha_pattern with different values match model.layers.0.self_attn.k_proj.weight"
    )
    assert (line in caplog.text) == says
    assert ("alpha_pattern" in caplog.text) == says


def test_alphas_in_an_order_that_peft_does_not_write_are_meant(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"target_modules": ["k_proj", "v_proj"], "alpha_pattern": OVERLAPPING}
    as_sorted = saved(tmp_path, False, settings)
    path = tmp_path / "adapter" / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": OVERLAPPING}))
    with torch.no_grad():
        assert not equal(load_tuned(tmp_path / "adapter")(IDS), as_sorted)
    assert "alpha_pattern" not in caplog.text


def test_a_token_beyond_the_base_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, False, KINDS["tokens"])
    path = tmp_path / "adapter" / ADAPTER_CONFIG
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "trainable_token_indices": [3, 61]}))
    with pytest.raises(CheckpointError, match=r"names token 61, but .* has 61 rows; use the base"):
        load_tuned(tmp_path / "adapter")


def test_an_adapter_of_all_layers_stays_beside_its_base(tmp_path: Path) -> None:
    saved(tmp_path, False, {"target_modules": ["q_proj", "up_proj"]})
    assert PeftFolder(tmp_path / "adapter").is_uniform(TINY.num_hidden_layers)
    names = dict(load_tuned(tmp_path / "adapter").named_parameters())
    assert "model.layers.1.mlp.up_proj.lora_A.weight" in names
    assert not PeftFolder(tmp_path / "adapter").is_uniform(3)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda held, name: {f"base_model.model.{name}": held[name].int()},
            " is torch.int32; llam",
        ),
        (lambda held, name: {name: held[name] + 1}, "with and without base_model.model. before it"),
        (lambda held, name: {f"base_model.model.{name}": held[name] / 0}, "are not finite: its tr"),
    ],
    ids=["integers", "twice", "infinite"],
)
def test_factors_that_cannot_be_are_refused(
    tmp_path: Path, change: Callable[[Any, str], Any], line: str
) -> None:
    """They would be rounded, taken at random, or make a model of NaN."""
    saved(tmp_path, False, KINDS["ranks"])
    path, name = tmp_path / "adapter" / ADAPTER_WEIGHTS, "model.layers.0.mlp.up_proj.lora_A.weight"
    held = load_file(path)
    plain = {stored.removeprefix("base_model.model."): tensor for stored, tensor in held.items()}
    save_file({**held, **change(plain, name)}, path)
    for reader in (load_tuned, lambda folder: merge(folder, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=rf"{name}.*{line}"):
            reader(tmp_path / "adapter")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_a_base_of_integers_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    """Quantised weights whose scales are elsewhere; merging would round the sums."""
    folder = hub_folder(tmp_path / "base", TINY)
    held, name = load_file(folder / "model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    save_file({**held, name: held[name].to(dtype)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} is {dtype}; llamax reads floating-point"):
        HfFolder(folder)
