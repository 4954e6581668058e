"""Stand-ins for trainers on Trainium: each writes a model as its documentation says.

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
