"""Stand-ins for other trainers: each writes one model as its documentation says, with torch.save.

They share nothing with llamax's own readers and writers, so that the two check each other.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llamax.config.model import ModelConfig

Values = Mapping[tuple[str, str], Tensor]  # (Hub name, kind) -> the whole tensor
Read = Callable[[str], Tensor]


def touch(path: Path, text: str = "1") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def save(held: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(held, path)


# --- neuronx-distributed -------------------------------------------------------------------------


def nxd_state(
    read: Read, model: ModelConfig, tp: int, rank: int, style: str, copies: int, layers: range
) -> dict[str, Tensor]:
    """A rank's state dict, in the order of NxD's Llama; ``read`` gives whole Hub tensors."""
    K, E = model.num_key_value_heads, model.head_dim

    def mine(whole: Tensor, dim: int = 0) -> Tensor:
        return whole.chunk(tp, dim)[rank]

    def reordered(queries: Tensor) -> Tensor:
        """[H * E, D]: beside copy c of key/value head k stand its c-th share of queries."""
        grid = queries.view(K, copies, -1, queries.shape[1])
        return grid.transpose(0, 1).reshape(queries.shape)

    state: dict[str, Tensor] = OrderedDict()
    if 0 in layers:
        state["model.embed_tokens.weight"] = mine(read("model.embed_tokens.weight"))
    for layer in layers:
        home = f"model.layers.{layer}."
        q, k, v, o = (read(f"{home}self_attn.{part}_proj.weight") for part in "qkvo")
        q = mine(reordered(q))
        k, v = (mine(x.repeat(copies, 1)) for x in (k, v))
        assert k.shape[0] == K * E * copies // tp
        if style == "stacked":
            state[f"{home}self_attn.qkv_proj.weight"] = torch.cat((q, k, v))
        elif style == "gqa-fused":
            state[f"{home}self_attn.qkv_proj.weight_qkv"] = torch.cat((q, k, v))
        else:
            for part, share in zip("qkv", (q, k, v), strict=True):
                name = f"qkv_proj.weight_{part}" if style == "gqa" else f"{part}_proj.weight"
                state[f"{home}self_attn.{name}"] = share
        state[f"{home}self_attn.o_proj.weight"] = mine(reordered(o.t()).t(), 1)
        gate, up = (mine(read(f"{home}mlp.{part}_proj.weight")) for part in ("gate", "up"))
        state[f"{home}mlp.gate_up_proj.weight"] = torch.cat((gate, up))
        state[f"{home}mlp.down_proj.weight"] = mine(read(f"{home}mlp.down_proj.weight"), 1)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{home}{norm}.weight"] = read(f"{home}{norm}.weight")
        state[f"{home}self_attn.rotary_emb.inv_freq"] = torch.ones(E // 2)
    if model.num_hidden_layers - 1 in layers:
        state["model.norm.weight"] = read("model.norm.weight")
        tied = "model.embed_tokens.weight" if model.tie_word_embeddings else "lm_head.weight"
        state["lm_head.weight"] = mine(read(tied))
    return {name: tensor.clone() for name, tensor in state.items()}


def nxd(
    folder: Path,
    values: Values,
    model: ModelConfig,
    tp: int = 2,
    pp: int = 1,
    dp: int = 0,
    style: str = "gqa",
    copies: int = 1,
    xser: bool = False,
    masters: bool = True,
    groups: int = 2,
    step: int = 7,
    zero1: bool = True,
    drop_weights: bool = False,
) -> Path:
    """``save_checkpoint(folder, "step_7", model, optimizer if dp)``; the tag's folder."""
    tag = folder / f"step_{step}"
    touch(tag / "checkpoint")
    each = model.num_hidden_layers // pp
    for stage in range(pp):
        layers = range(stage * each, (stage + 1) * each)
        for rank in range(tp):
            states = {
                kind: nxd_state(
                    lambda name, kind=kind: values[name, kind],
                    model, tp, rank, style, copies, layers,
                )
                for kind in {kind for _, kind in values}
            }  # fmt: skip
            at = f"tp_rank_{rank:02d}_pp_rank_{stage:02d}.pt"
            write = save_xser if xser else save
            write(states["weight"], tag / "model" / f"dp_rank_00_{at}")
            if xser and drop_weights:
                for file in (tag / "model" / f"dp_rank_00_{at}.tensors").iterdir():
                    file.unlink()
            for data in range(dp):
                held = nxd_optimizer(states, model, data, dp, masters, groups, step, zero1)
                if zero1 or data == 0:
                    write(held, tag / "optim" / f"dp_rank_{data:02d}_{at}")
    save({"epoch": 3}, tag / "user_content.pt")
    save({"last_epoch": 7}, tag / "scheduler.pt")
    touch(tag / "done")
    return tag


def nxd_optimizer(
    states: Mapping[str, Mapping[str, Tensor]],
    model: ModelConfig,
    rank: int,
    dp: int,
    masters: bool,
    groups: int,
    step: int,
    zero1: bool,
) -> dict[str, Any]:
    """The state of NeuronZero1Optimizer on one data rank, or of a plain AdamW."""
    names = [name for name in states["weight"] if not name.endswith("inv_freq")]
    if model.tie_word_embeddings:
        names = [name for name in names if name != "lm_head.weight"]
    order = [names]
    if groups == 2:
        no_decay = ["bias", "norm"]
        order = [
            [name for name in names if not any(word in name for word in no_decay)],
            [name for name in names if any(word in name for word in no_decay)],
        ]

    def shard(tensor: Tensor) -> Tensor:
        if not zero1:
            return tensor
        if tensor.size(0) % dp:
            pad = dp - tensor.size(0) % dp
            tensor = F.pad(tensor, [0, 0] * (tensor.dim() - 1) + [0, pad])
        return tensor.chunk(dp)[rank].clone()

    state = {
        number: {
            "step": torch.tensor(float(step)),
            "exp_avg": shard(states["exp_avg"][name]),
            "exp_avg_sq": shard(states["exp_avg_sq"][name]),
        }
        for number, name in enumerate(name for group in order for name in group)
    }
    held: dict[str, Any] = {"state": {}, "param_groups": []}
    start = 0
    for group in order:
        numbers = [*range(start, start + len(group))]
        held["param_groups"].append({"lr": 1e-4, "betas": (0.9, 0.95), "params": numbers})
        start += len(group)
    if not zero1:
        return held | {"state": state}
    held["base_state"] = state
    flat = [name for group in order for name in group]
    held["shape_info"] = {n: states["weight"][name].shape for n, name in enumerate(flat)}
    if masters:
        held["sharded_master_weights"] = {
            number: shard(states["master"][name]) for number, name in enumerate(flat)
        }
    return held


@contextmanager
def torch_xla_serialization() -> Iterator[type]:
    """A stand-in for torch_xla's module, so that its class is pickled under its name."""
    names = ("torch_xla", "torch_xla.utils", "torch_xla.utils.serialization")
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = ModuleType(name)

    class TensorReference:
        def __init__(self, tid: int) -> None:
            self.tid = tid

    TensorReference.__module__, TensorReference.__qualname__ = names[-1], "TensorReference"
    sys.modules[names[-1]].TensorReference = TensorReference
    yield TensorReference
    for name, module in before.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module


def save_xser(held: dict[Any, Any], path: Path) -> None:
    """NxD's ``use_xser``: references in the file, tensors beside it, shapes in the .info.pt."""
    folder = path.with_name(path.name + ".tensors")
    folder.mkdir(parents=True)
    info: dict[int, dict[str, Any]] = {}

    def referred(value: Any) -> Any:
        if isinstance(value, Tensor):
            number = len(info)
            info[number] = {
                "dtype": value.dtype,
                "shape": value.shape,
                "expert_model_parallel": False,
            }
            torch.save(value, folder / f"tensor_{number}.pt")
            return TensorReference(number)
        return {k: referred(v) for k, v in value.items()} if isinstance(value, dict) else value

    with torch_xla_serialization() as TensorReference:
        torch.save(referred(dict(held)), path)
    torch.save(info, path.with_name(path.name + ".info.pt"))


# --- optimum-neuron ------------------------------------------------------------------------------


def optimum(
    folder: Path,
    values: Values,
    model: ModelConfig,
    tp: int,
    copies: int,
    pp: int = 1,
    xser: bool = False,
) -> Path:
    """``NeuronModelForCausalLM.save_pretrained(folder)``."""
    tag = nxd(folder, values, model, tp, pp, copies=copies, xser=xser)
    tag.rename(folder / "shards")
    (folder / "config.json").write_text(json.dumps(model.to_hub("float32")))
    (folder / "trn_config.json").write_text("{}")
    each = model.num_hidden_layers // pp
    for stage in range(pp):
        layers = range(stage * each, (stage + 1) * each)
        state = nxd_state(lambda name: values[name, "weight"], model, tp, 0, "gqa", copies, layers)
        parameters = {
            name: {
                "tensor_model_parallel": True,
                "partition_dim": int(name.endswith(("o_proj.weight", "down_proj.weight"))),
                "partition_stride": 2 if "gate_up" in name else 1,
                "num_partitions": tp,
            }
            if "norm" not in name
            else {"tensor_model_parallel": False}
            for name in state
            if not name.endswith("inv_freq")
        }
        specs = [
            {
                "module_fully_qualified_name": f"model.layers.{layer}.self_attn",
                "specs": [
                    [
                        "GQAQKVColumnParallelLinearSpec",
                        {"kv_size_multiplier": copies, "fuse_qkv": False, "tp_size": tp},
                    ]
                ],
            }
            for layer in layers
        ]
        text = json.dumps({"parameters": parameters, "model_weight_transformation_specs": specs})
        (folder / "shards" / f"mp_metadata_pp_rank_{stage}.json").write_text(text)
    return folder


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
