"""A stand-in for optimum-neuron's trainer of adapters: writes LoRA factors as its ranks hold them.

It shares nothing with llamax's reader, so that the two check each other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamax.config.model import ModelConfig
from support.foreign import save, save_xser, touch

SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # one A where they are fused
HOME = "base_model.model.model.layers."


def share_factors(whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's tensors, with the A of the first projection in the place of those fused with it."""
    shared = dict(whole)
    for name in whole:
        for first, *others in SHARED:
            for other in others:
                if f".{other}.lora_A" in name:
                    shared[name] = whole[name.replace(other, first)].clone()
    return shared


def optimum_adapter(
    out: Path,
    whole: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    model: ModelConfig,
    tp: int = 1,
    pp: int = 1,
    copies: int = 1,
    fused: bool = False,
    xser: bool = False,
    name: str = "default",
) -> Path:
    """``NeuronPeftModel.save_pretrained(out)`` of PEFT's tensors; the folder of the adapter.

    ``copies`` above 1: key/value heads are repeated, and q, k and v are one layer, stacked if
    ``fused``.
    """
    home = out / f"adapter_{name}"
    touch(home / "adapter_shards" / "done")
    (home / "adapter_config.json").write_text(json.dumps(settings))
    each = model.num_hidden_layers // pp
    for stage in range(pp):
        layers = range(stage * each, (stage + 1) * each)
        states = [_state(whole, model, tp, rank, copies, fused, layers) for rank in range(tp)]
        for rank, (state, _) in enumerate(states):
            file = f"dp_rank_00_tp_rank_{rank:02d}_pp_rank_{stage:02d}.pt"
            (save_xser if xser else save)(state, _made(home / "adapter_shards" / "model") / file)
        parameters = {
            _with_name(key, name): {"tensor_model_parallel": False}
            if dim is None
            else {"tensor_model_parallel": True, "partition_dim": dim, "num_partitions": tp}
            for key, dim in states[0][1].items()
        }
        parameters[f"{HOME}{layers[0]}.mlp.down_proj.base_layer.weight"] = {
            "tensor_model_parallel": True,
            "partition_dim": 1,
        }
        specs = [spec for layer in layers for spec in _specs(model, tp, copies, fused, layer)]
        text = json.dumps({"parameters": parameters, "model_weight_transformation_specs": specs})
        (home / "adapter_shards" / f"mp_metadata_pp_rank_{stage}.json").write_text(text)
    return home


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _with_name(key: str, name: str) -> str:
    return key.replace("lora_A.", f"lora_A.{name}.").replace("lora_B.", f"lora_B.{name}.")


def _state(
    whole: Mapping[str, Tensor],
    model: ModelConfig,
    tp: int,
    rank: int,
    copies: int,
    fused: bool,
    layers: range,
) -> tuple[dict[str, Tensor], dict[str, int | None]]:
    """A rank's state dict, and the dimension along which each tensor is marked as cut."""

    def reordered(queries: Tensor) -> Tensor:
        grid = queries.view(model.num_key_value_heads, copies, -1, queries.shape[1])
        return grid.transpose(0, 1).reshape(queries.shape)

    def mine(tensor: Tensor, dim: int = 0) -> Tensor:
        return tensor.chunk(tp, dim)[rank]

    held: dict[str, tuple[Tensor, int | None]] = {}
    for layer in layers:
        at = f"{HOME}{layer}."

        def a(module: str, at: str = at) -> Tensor:
            return whole[f"{at}{module}.lora_A.weight"]

        def b(module: str, at: str = at) -> Tensor:
            return whole[f"{at}{module}.lora_B.weight"]

        attention = f"{at}self_attn."
        if copies == 1:
            for part in "qkv":
                module = f"self_attn.{part}_proj"
                held[f"{at}{module}.lora_A.weight"] = a(module), None
                held[f"{at}{module}.lora_B.weight"] = mine(b(module)), 0
        else:
            q = mine(reordered(b("self_attn.q_proj")))
            k, v = (mine(b(f"self_attn.{part}_proj").repeat(copies, 1)) for part in "kv")
            held[f"{attention}qkv_proj.lora_A.weight"] = a("self_attn.q_proj"), None
            parts = {"qkv": torch.cat((q, k, v))} if fused else {"q": q, "k": k, "v": v}
            for part, share in parts.items():
                cut = None if fused else 0  # the metadata of a stacked one says nothing
                held[f"{attention}qkv_proj.lora_B.weight_{part}"] = share, cut
        output = a("self_attn.o_proj")
        output = reordered(output.t()).t() if copies > 1 else output
        held[f"{attention}o_proj.lora_A.weight"] = mine(output, 1), 1
        held[f"{attention}o_proj.lora_B.weight"] = b("self_attn.o_proj"), None
        halves = [mine(b(f"mlp.{part}_proj")) for part in ("gate", "up")]
        held[f"{at}mlp.gate_up_proj.lora_A.weight"] = a("mlp.gate_proj"), None
        held[f"{at}mlp.gate_up_proj.lora_B.weight"] = torch.cat(halves), 0
        held[f"{at}mlp.down_proj.lora_A.weight"] = mine(a("mlp.down_proj"), 1), 1
        held[f"{at}mlp.down_proj.lora_B.weight"] = b("mlp.down_proj"), None
    state = {key: tensor.clone().contiguous() for key, (tensor, _) in held.items()}
    return state, {key: cut for key, (_, cut) in held.items()}


def _specs(
    model: ModelConfig, tp: int, copies: int, fused: bool, layer: int
) -> list[dict[str, Any]]:
    both = {
        "fused_linear_name": "gate_up_proj",
        "linear_names": ["gate_proj", "up_proj"],
        "bias": False,
        "fuse_axis": 0,
        "original_dims": [model.intermediate_size] * 2,
        "tp_size": tp,
        "peft_type": "lora",
    }
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    repeated = {
        "gqa_qkv_projection_name": "qkv_proj",
        **{f"{part}_projection_name": f"{part[0]}_proj" for part in ("query", "key", "value")},
        "output_projection_name": "o_proj",
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "kv_size_multiplier": copies,
        "q_output_size_per_partition": heads * model.head_dim // tp,
        "kv_output_size_per_partition": kv_heads * copies * model.head_dim // tp,
        "fuse_qkv": fused,
        "bias": False,
        "tp_size": tp,
        "peft_type": "lora",
    }
    specs = [("mlp", "FusedLinearsSpec", both)]
    specs += [("self_attn", "GQAQKVColumnParallelLinearSpec", repeated)] if copies > 1 else []
    return [
        {"module_fully_qualified_name": f"{HOME}{layer}.{module}", "specs": [[kind, about]]}
        for module, kind, about in specs
    ]
