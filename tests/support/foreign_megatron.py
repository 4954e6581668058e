"""Stand-ins for NeMo's Megatron and for Meta: each writes one model as its documentation says."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamax.config.model import ModelConfig
from support.foreign import Values, save

# --- NeMo ----------------------------------------------------------------------------------------


def nemo(
    folder: Path,
    values: Values,
    model: ModelConfig,
    tp: int = 1,
    pp: int = 1,
    core: bool = False,
    split_mlp: bool = False,
    layout: str = "nemo",
    pad: int = 0,
) -> Path:
    """The rank folders of a Megatron GPT model; ``layout`` megatron nests dicts as Megatron-LM.

    ``pad`` rows are added to the vocabulary (make_vocab_size_divisible_by).
    """
    G = model.num_attention_heads // model.num_key_value_heads
    E, each = model.head_dim, model.num_hidden_layers // pp
    for stage in range(pp):
        for rank in range(tp):

            def mine(name: str, dim: int = 0, rank: int = rank) -> Tensor:
                whole = values[name, "weight"]
                if len(whole) == model.vocab_size:
                    whole = torch.cat((whole, torch.randn(pad, whole.shape[1]).to(whole.dtype)))
                return whole.chunk(tp, dim)[rank].clone()

            state: dict[str, Tensor] = {}
            if stage == 0:
                embedding = mine("model.embed_tokens.weight")
                state["embedding.word_embeddings.weight"] = embedding
            for local in range(each):
                home = f"model.layers.{stage * each + local}."
                q, k, v = (mine(f"{home}self_attn.{part}_proj.weight") for part in "qkv")
                rows = []
                for group in range(len(k) // E):
                    rows += [q[group * G * E : (group + 1) * G * E]]
                    rows += [k[group * E : (group + 1) * E], v[group * E : (group + 1) * E]]
                gate, up = (mine(f"{home}mlp.{part}_proj.weight") for part in ("gate", "up"))
                out, down = (
                    mine(f"{home}self_attn.o_proj.weight", 1),
                    mine(f"{home}mlp.down_proj.weight", 1),
                )
                first, second = (
                    values[f"{home}{norm}.weight", "weight"]
                    for norm in ("input_layernorm", "post_attention_layernorm")
                )
                trunk = "decoder" if core else "encoder"
                layer = f"{trunk}.layers.{local}."
                if core:
                    state |= {
                        f"{layer}self_attention.linear_qkv.weight": torch.cat(rows),
                        f"{layer}self_attention.linear_qkv.layer_norm_weight": first,
                        f"{layer}self_attention.linear_proj.weight": out,
                        f"{layer}mlp.linear_fc1.weight": torch.cat((gate, up)),
                        f"{layer}mlp.linear_fc1.layer_norm_weight": second,
                        f"{layer}mlp.linear_fc2.weight": down,
                    }
                    continue
                state |= {
                    f"{layer}self_attention.query_key_value.weight": torch.cat(rows),
                    f"{layer}self_attention.dense.weight": out,
                    f"{layer}mlp.dense_4h_to_h.weight": down,
                    f"{layer}input_layernorm.weight": first,
                    f"{layer}post_attention_layernorm.weight": second,
                    f"{layer}mlp.dense_h_to_4h.weight": gate
                    if split_mlp
                    else torch.cat((gate, up)),
                    **({f"{layer}mlp.dense_h_to_4h_2.weight": up} if split_mlp else {}),
                }
            if stage == pp - 1:
                trunk = "decoder" if core else "encoder"
                state[f"{trunk}.final_layernorm.weight"] = values["model.norm.weight", "weight"]
                state["output_layer.weight"] = mine("lm_head.weight")
            if stage == 0:
                state["rotary_pos_emb.inv_freq"] = torch.ones(E // 2)
            write_nemo(folder, state, rank, stage, tp, pp, core, layout)
    return folder


def write_nemo(
    folder: Path,
    state: dict[str, Tensor],
    rank: int,
    stage: int,
    tp: int,
    pp: int,
    core: bool,
    layout: str,
) -> None:
    if layout == "megatron":
        home = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
        nested: dict[str, Any] = {"encoder": {}}
        for name, tensor in state.items():
            if name.startswith("encoder."):
                nested["encoder"][name.removeprefix("encoder.")] = tensor
            elif name.startswith("embedding."):
                nested["embedding"] = {"word_embeddings": {"weight": tensor}}
            elif name.startswith("output_layer."):
                nested["output_layer"] = {"weight": tensor}
        held = {"iteration": 5, "model": {"language_model": nested}, "checkpoint_version": 3.0}
        save(held, folder / home / "model_optim_rng.pt")
        return
    prefix = "model." if core else "model.language_model."
    named = OrderedDict((prefix + name, tensor) for name, tensor in state.items())
    if tp * pp == 1:
        save(named, folder / "model_weights.ckpt")
    elif pp == 1:
        save(named, folder / f"mp_rank_{rank:02d}" / "model_weights.ckpt")
    else:
        home = f"tp_rank_{rank:02d}_pp_rank_{stage:03d}"
        save({"state_dict": named, "epoch": 1}, folder / home / "model_weights.ckpt")


# --- Meta ----------------------------------------------------------------------------------------

META = {
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
}


def meta_rows(whole: Tensor, heads: int) -> Tensor:
    """Row i of a head's first half goes to 2 i, of its second half to 2 i + 1."""
    moved = torch.empty_like(whole)
    width = len(whole) // heads
    for head in range(heads):
        for i in range(width // 2):
            start = head * width
            moved[start + 2 * i] = whole[start + i]
            moved[start + 2 * i + 1] = whole[start + width // 2 + i]
    return moved


def meta(
    folder: Path, values: Values, model: ModelConfig, ranks: int = 1, embedding_dim: int = 1
) -> Path:
    """consolidated.XX.pth and params.json, as Llama 2 (embedding cut by features) or 3."""
    for rank in range(ranks):

        def mine(whole: Tensor, dim: int = 0, rank: int = rank) -> Tensor:
            return whole.chunk(ranks, dim)[rank].clone()

        state = {
            "tok_embeddings.weight": mine(
                values["model.embed_tokens.weight", "weight"], embedding_dim
            ),
            "norm.weight": values["model.norm.weight", "weight"],
            "output.weight": mine(values["lm_head.weight", "weight"]),
            "rope.freqs": torch.ones(model.head_dim // 2),
        }
        for layer in range(model.num_hidden_layers):
            home, there = f"model.layers.{layer}.", f"layers.{layer}."
            for name, heads in (
                ("q", model.num_attention_heads),
                ("k", model.num_key_value_heads),
            ):
                whole = values[f"{home}self_attn.{name}_proj.weight", "weight"]
                state[f"{there}attention.w{name}.weight"] = mine(meta_rows(whole, heads))
            for name, (other, dim) in META.items():
                state[f"{there}{other}.weight"] = mine(
                    values[f"{home}{name}.weight", "weight"], dim
                )
            state[f"{there}attention_norm.weight"] = values[
                f"{home}input_layernorm.weight", "weight"
            ]
            state[f"{there}ffn_norm.weight"] = values[
                f"{home}post_attention_layernorm.weight", "weight"
            ]
        save(state, folder / f"consolidated.{rank:02d}.pth")
    params = {
        "dim": model.hidden_size,
        "n_layers": model.num_hidden_layers,
        "n_heads": model.num_attention_heads,
        "n_kv_heads": model.num_key_value_heads,
        "multiple_of": 256,
        "norm_eps": 1e-5,
        "vocab_size": -1,
    }
    (folder / "params.json").write_text(json.dumps(params))
    return folder
