"""A Llama with modules of its own: gates, a norm, an adapter, a bias, scales of every kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llamax import ops
from llamax.model.llama import FeedForward, Llama
from llamax.parallel.collectives import Axis
from llamax.parallel.sharding import Replica
from llamax.parallel.tensor_parallel import ColumnLinear


class CentredNorm(nn.Module):
    """An RMSNorm with weights around zero: x_BsD -> x_BsD."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, 1 + self.weight, 1e-5)


class Gated(FeedForward):
    """A feed-forward with a gate that is closed at first, and a bottleneck beside it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        features = args[0].hidden_size
        self.gate = nn.Parameter(torch.zeros(()))
        self.down = nn.Linear(features, 4)
        self.up = nn.Linear(4, features)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x) * (1 + self.gate) + self.up(torch.tanh(self.down(x)))
        return y


class BiasedColumn(ColumnLinear):
    """A column-parallel layer with a bias, which is cut as the rows of its weight are."""

    def __init__(self, old: ColumnLinear, features: int) -> None:
        super().__init__(old.shard.blocks, features, old.tp, old.sequence_parallel, old.weight)
        self.bias = nn.Parameter(torch.zeros(self.weight.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


class HeadScale(nn.Module):
    """A scale of every head's output: each tensor rank uses those of its heads."""

    shard = Replica(partial=True)

    def __init__(self, heads: int, tp: Axis, declared: bool = True) -> None:
        super().__init__()
        self.tp, self.scale = tp, nn.Parameter(torch.ones(heads))
        if not declared:
            self.shard = None  # type: ignore[assignment]

    def forward(self, o_BShE: Tensor) -> Tensor:
        heads = o_BShE.shape[2]
        mine = self.scale[self.tp.rank * heads : (self.tp.rank + 1) * heads]
        return o_BShE * mine[:, None]


class LogitScale(nn.Module):
    """A scale of all logits, which are whole on every rank: so is its gradient."""

    shard = Replica(partial=False)

    def __init__(self, declared: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        if not declared:
            self.shard = None  # type: ignore[assignment]


class OwnLlama(Llama):
    """A Llama with all of them; its loss is computed from whole logits."""

    head_declared = logits_declared = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        D = self.config.hidden_size
        torch.manual_seed(3)  # of the bottleneck
        like = self.model.norm.weight
        for layer in self.model.layers.values():
            layer.post_attention_layernorm = CentredNorm(D)
            layer.self_attn.qkv_proj = BiasedColumn(layer.self_attn.qkv_proj, D)
            layer.mlp = Gated(self.config, self.tp, self.sequence_parallel, like)
        self.heads = HeadScale(self.config.num_attention_heads, self.tp, self.head_declared)
        self.logits = LogitScale(self.logits_declared)

    def loss(self, ids_BS: Tensor, labels_BS: Tensor, *args: Any, **options: Any) -> Any:
        documents, given = options.get("documents_BS"), options.get("attend")

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            o = given(q, k, v, layer) if given else ops.attention(q, k, v, documents)
            scaled: Tensor = self.heads(o)
            return scaled

        logits = self(ids_BS, *args, documents_BS=documents, attend=attend) * self.logits.scale
        total = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels_BS.flatten().long(), reduction="sum"
        )
        return total, (labels_BS >= 0).sum().float()


class WithDropout(nn.Module):
    """A feed-forward whose output loses features by torch's own generator."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x_BsD: Tensor) -> Tensor:
        return nn.functional.dropout(self.inner(x_BsD), 0.5)
