"""A parallel layer with a frozen weight, and the low-rank adapters beside it (Hu et al. 2021).

::

    column    x_BsD ──gather──> x_BSD ─┬─ W ──────────────────────────> y_BSf
                                       └─ A [r,D] ─> a_BSr ─ B [f,r] ──> +

    row       y_BSf ─┬─ W ────────────────────────────> z_BSD, partial ──reduce-scatter──> z_BsD
                     └─ A [r,f] ─> a_BSr ─ B [D,r] ──> +  (partial too)

An adapter sends nothing of its own.  In a column-parallel layer B is cut as the rows of W are, and
A, whole on every rank, reads the input that is gathered for W; in a row-parallel layer A is cut as
the columns of W are, and B, whole on every rank, adds to the partial sums before they are reduced.
Backward mirrors it: the adapter's part of the input gradient joins W's before that is reduced.
What remains is the gradient of the whole factor (A of a column, B of a row): each rank sees a part
of it, with or without sequence parallelism, so it is ``Replica(partial=True)`` and the optimizer
sums it over the tensor ranks, once a step.

A layer keeps a_BSr and, where it has adapters, its input as it came: backward gathers it again, or
makes it again (``llamax.parallel.tensor_parallel``).  W is asked of its store when it is used,
forward and backward, and not kept: it may be quantised, or lie on other ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llamax import ops
from llamax.model.dropout import Dropout, feature_keys, kept
from llamax.parallel import regions
from llamax.parallel.collectives import Axis
from llamax.parallel.fsdp import Store
from llamax.parallel.sharding import Cut, Shard, local_shape
from llamax.parallel.tensor_parallel import keep_input, kept_input


class Factor(nn.Module):
    """``lora_A`` or ``lora_B`` of an adapter: a weight that knows how it is cut."""

    def __init__(self, whole: Sequence[int], how: Cut, degree: int, like: Tensor) -> None:
        super().__init__()
        self.shard = how
        self.weight = nn.Parameter(like.new_empty(local_shape(whole, how, degree)))


class Adapter(NamedTuple):
    """Factors A [r, in] and B [out, r] for the outputs [start, start + length) of a layer.

    ``number`` identifies the projection in its model.
    """

    a: Factor
    b: Factor
    scale: float
    number: int
    start: int
    length: int


class _FrozenMatmul(torch.autograd.Function):
    """The product with W and all adapters; ``factors`` are A and B of each adapter in turn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear, *factors: Tensor) -> Tensor:
        whole = layer.gathered(x)
        y = ops.linear(whole, layer.dense())
        narrow = []
        ctx.layer, ctx.tokens_BS = layer, layer.dropout.tokens_BS
        for adapter, a, b in layer.pairs(factors):
            stays = layer.stays(whole.shape[-1], adapter, ctx.tokens_BS)
            a_BSr = ops.linear(layer.dropout(whole, stays), a)
            outputs = y.narrow(-1, adapter.start, adapter.length)
            outputs.add_(ops.linear(a_BSr, b), alpha=adapter.scale)
            narrow.append(a_BSr)
        ctx.save_for_backward(keep_input(ctx, x) if factors else None, *factors, *narrow)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        layer, tokens_BS = ctx.layer, ctx.tokens_BS
        x, *saved = ctx.saved_tensors
        factors = saved[: 2 * len(layer.adapters)]
        narrow = saved[2 * len(layer.adapters) :]
        whole = layer.gathered(kept_input(ctx, x)) if factors else x
        dx = ops.matmul_grad_input(dy, layer.dense()) if ctx.needs_input_grad[0] else None
        gradients: list[Tensor | None] = []
        for (adapter, a, b), a_BSr in zip(layer.pairs(factors), narrow, strict=True):
            d_outputs = dy.narrow(-1, adapter.start, adapter.length) * adapter.scale
            da_BSr = ops.matmul_grad_input(d_outputs, b)
            stays = layer.stays(whole.shape[-1], adapter, tokens_BS)
            gradients.append(ops.matmul_grad_weight(da_BSr, layer.dropout(whole, stays)))
            gradients.append(ops.matmul_grad_weight(d_outputs, a_BSr))
            if dx is not None:
                dx = dx + layer.dropout(ops.matmul_grad_input(da_BSr, a), stays)
        return None if dx is None else layer.scattered(dx), None, *gradients


class FrozenLinear(nn.Module):
    """A column- or row-parallel layer with a frozen weight: [.., in] -> [.., out].

    ``how`` is the cut of its weight: a parameter, or in a store.  ``adapters`` are its adapters,
    which are registered elsewhere, by the names of their projections.
    """

    def __init__(
        self,
        weight: nn.Parameter | Store,
        how: Shard,
        adapters: Sequence[Adapter],
        tp: Axis,
        sequence_parallel: bool,
        dropout: Dropout,
    ) -> None:
        super().__init__()
        self.shard, self.adapters = how, tuple(adapters)
        self.store = None if isinstance(weight, nn.Parameter) else weight
        if isinstance(weight, nn.Parameter):
            self.weight = weight
        self.tp, self.sequence_parallel = tp, sequence_parallel
        self.column, self.dropout = how.dim == 0, dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.partial(x) if self.column else self.reduced(self.partial(x))

    def partial(self, x: Tensor) -> Tensor:
        """The product and its adapters': of a row-parallel layer this rank's part of the sum."""
        factors = [factor.weight for each in self.adapters for factor in (each.a, each.b)]
        return regions.apply(_FrozenMatmul, x, self, *factors)

    def reduced(self, z_BSD: Tensor) -> Tensor:
        """The sum over ranks of what a row-parallel layer made: z_BSD -> y_BsD."""
        return regions.leave(z_BSD, self.tp, self.sequence_parallel)

    def dense(self) -> Tensor:
        """The weight: [f, D]."""
        return self.weight if self.store is None else self.store.weight()

    def pairs(self, factors: Sequence[Tensor]) -> Iterator[tuple[Adapter, Tensor, Tensor]]:
        """Each adapter with its A and B."""
        yield from zip(self.adapters, factors[::2], factors[1::2], strict=True)

    def gathered(self, x: Tensor) -> Tensor:
        """The whole sequence of a column's input; a row's input is whole already."""
        return self.tp.all_gather(x, 1) if self.column and self.sequence_parallel else x

    def scattered(self, dx: Tensor) -> Tensor:
        """The transpose of ``gathered``, and of what follows where x was the same everywhere."""
        if not self.column:
            return dx
        return self.tp.reduce_scatter(dx, 1) if self.sequence_parallel else self.tp.all_reduce(dx)

    def stays(self, features: int, adapter: Adapter, tokens_BS: Tensor | None) -> Tensor | None:
        """Which features of an adapter's input stay, bool [B,S,F]; None: all of them."""
        if tokens_BS is None:
            return None
        start = self.tp.rank_index * (0 if self.column else features)
        return kept(tokens_BS, feature_keys(adapter.number, features, start), self.dropout.p)
