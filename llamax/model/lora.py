"""LoRA: low-rank adapters beside frozen projections (Hu et al. 2021).

::

    y = W x + s B A drop(x)        A [r, in], B [out, r];  s = alpha / r, or alpha / sqrt(r)

A starts uniform in +-1/sqrt(in) and B at zero, so that training begins at the base model.  s with
the root is rsLoRA (Kalajdzievski 2023).  Names are PEFT's: factors hang where the Hub's projections
would, ``model.layers.3.self_attn.q_proj.lora_A.weight``, beside the fused layer to which they add
their outputs.  ``llamax.model.lora_linear`` computes them.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor, nn

from llamax.config.model import ModelConfig
from llamax.config.rules.finetune import LINEAR, target_names
from llamax.config.schema import FinetuneConfig
from llamax.model.dropout import Dropout
from llamax.model.initial_weights import generator
from llamax.model.llama import Llama
from llamax.model.lora_linear import Adapter, Factor, FrozenLinear
from llamax.parallel.fsdp import Store
from llamax.parallel.sharding import Block, Cut, Part, Replica, Shard, cut, parts
from llamax.parallel.tensor_parallel import ColumnLinear, RowLinear

Linear = ColumnLinear | RowLinear

# (name of a frozen weight, its layer) -> the weight from now on
Keep = Callable[[str, Linear], "nn.Parameter | Store"]
LAYERS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def scale(finetune: FinetuneConfig) -> float:
    """The factor on an adapter's output."""
    return finetune.alpha / (sqrt(finetune.r) if finetune.rslora else finetune.r)


def keep_dense(name: str, layer: Linear) -> nn.Parameter:
    """The weight stays a parameter of its layer."""
    return layer.weight


def adapt(
    model: Llama, finetune: FinetuneConfig, like: Tensor, seed: int = 0, keep: Keep = keep_dense
) -> Llama:
    """Freeze a model and give its target projections adapters, uninitialised.

    ``like`` has the adapters' dtype and device, ``seed`` is that of dropout.  ``keep`` stores the
    frozen weight of a linear layer: as a parameter, or quantised.
    """
    model.requires_grad_(False)
    model.dropout = Dropout(finetune.dropout, seed)
    for number in model.model.layers:
        for path in LAYERS:
            name = f"model.layers.{number}.{path}"
            _replace(model, name, finetune, like, keep)
    return model


def _replace(model: Llama, name: str, finetune: FinetuneConfig, like: Tensor, keep: Keep) -> None:
    """Put a frozen layer with its adapters in the place of a linear layer."""
    above, _, own = name.rpartition(".")
    owner, old = model.get_submodule(above), model.get_submodule(name)
    assert isinstance(old, (ColumnLinear, RowLinear))
    assert model.dropout is not None
    adapters, targets = {}, target_names(finetune.targets)
    for part in parts(f"{name}.weight", old.shard, model.tp.size):
        projection = part.name.split(".")[-2]
        if projection in targets:
            a, b = _factors(old, part, finetune.r, like)
            number = int(name.split(".")[2]) * len(LINEAR) + LINEAR.index(projection)
            column = old.shard.dim == 0
            start, length = (part.start, part.length) if column else (0, old.weight.shape[0])
            adapters[projection] = Adapter(a, b, scale(finetune), number, start, length)
    weight = keep(f"{name}.weight", old)
    new = FrozenLinear(
        weight, old.shard, [*adapters.values()], old.tp, old.sequence_parallel, model.dropout
    )
    owner.add_module(own, new)
    for projection, adapter in adapters.items():
        home = new if projection == own else nn.Module()
        home.add_module("lora_A", adapter.a)
        home.add_module("lora_B", adapter.b)
        owner.add_module(projection, home)


def _factors(layer: Linear, part: Part, r: int, like: Tensor) -> tuple[Factor, Factor]:
    """A and B of one projection, cut as its weight is."""
    assert isinstance(part.how, Shard)
    (block,) = part.how.blocks
    cut_block = Block(block.size, unit=block.unit)  # without a name: factors are not fused
    column = part.how.dim == 0
    out = block.size if column else layer.weight.shape[0]
    into = layer.weight.shape[1] if column else block.size
    cut_a: Cut = Replica(partial=True) if column else Shard(1, (cut_block,))
    cut_b: Cut = Shard(0, (cut_block,)) if column else Replica(partial=True)
    degree = layer.tp.size
    return Factor((r, into), cut_a, degree, like), Factor((out, r), cut_b, degree, like)


def num_parameters(model: ModelConfig, finetune: FinetuneConfig) -> int:
    """The number of weights of all adapters of a model."""
    D, F = model.hidden_size, model.intermediate_size
    H, K = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    both = {"q_proj": D + H, "k_proj": D + K, "v_proj": D + K, "o_proj": H + D}
    both |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), D + F)
    each = sum(both[name] for name in set(target_names(finetune.targets)))
    return model.num_hidden_layers * finetune.r * each


@torch.no_grad()
def init(model: Llama, seed: int) -> None:
    """Draw A whole from a generator seeded by (seed, name), then cut it; B is zero."""
    for name, (parameter, how) in model.sharded_parameters().trained().items():
        if ".lora_B." in name:
            parameter.zero_()
            continue
        r, width = parameter.shape
        if isinstance(how, Shard):
            width = how.blocks[0].size
        bound = 1 / sqrt(width)
        whole = torch.empty(r, width).uniform_(-bound, bound, generator=generator(seed, name))
        parameter.copy_(cut(whole, how, model.tp.size, model.tp.rank))
