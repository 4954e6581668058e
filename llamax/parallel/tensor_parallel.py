"""Column-, row- and vocabulary-parallel layers (Shoeybi et al. 2019; Korthikanti et al. 2022).

A feed-forward or attention block is a column-parallel layer, something local to the rank, and a
row-parallel layer; two collectives forward, two backward::

                 column                          row
    x_BsD ──gather──> x_BSD W^T ──> y_BSf ──> y_BSf W^T ──reduce-scatter──> z_BsD

Without sequence parallelism the input is already whole (gather is the identity, its gradient is
all-reduced) and the output is all-reduced.  Each layer knows its ``Shard``: how its weight is cut.

A product needs its input again for the gradient of its weight.  Where a cheap operation made that
input (RMSNorm, SwiGLU), it is not kept: backward asks the operation for it.  Its node in the graph
has ``again``, a function of the tensors that it saved for its own backward, which comes later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llamax import ops
from llamax.config.constants import MADE_AGAIN_BYTES
from llamax.parallel import regions
from llamax.parallel.collectives import Axis, Solo
from llamax.parallel.fsdp import Store
from llamax.parallel.sharding import (
    Block,
    Shard,
    ShardedParameter,
    ShardedParameters,
    declared_cut,
    local_shape,
)
from llamax.parallel.weight_gradient import GradientSum, postponed


def is_made_again(x: Tensor) -> bool:
    """Whether backward makes the input x of a product again; a small one is cheaper to keep."""
    return x.nbytes >= MADE_AGAIN_BYTES and hasattr(x.grad_fn, "again")


def keep_input(ctx: Any, x: Tensor) -> Tensor | None:
    """What a product saves of its input x for ``kept_input``."""
    ctx.source = x.grad_fn if is_made_again(x) else None
    return x if ctx.source is None else None


def kept_input(ctx: Any, saved: Tensor | None) -> Tensor:
    """The input of a product, from what ``keep_input`` saved."""
    if saved is not None:
        return saved
    source = ctx.source
    if "unpacked" not in vars(source):  # recomputation gives a saved tensor only once
        source.unpacked = source.saved_tensors
    x: Tensor = source.again(*source.unpacked)
    return x


class _ColumnMatmul(torch.autograd.Function):
    """gather(x) @ W^T that saves at most the sharded x and gathers it again in backward.

    The gradient of W is added to ``total``, where there is one, if it is to be accumulated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        axis: Axis,
        sequence_parallel: bool,
        total: GradientSum | None,
    ) -> Tensor:
        ctx.save_for_backward(keep_input(ctx, x) if ctx.needs_input_grad[1] else None, weight)
        ctx.axis, ctx.sequence_parallel = axis, sequence_parallel
        ctx.total, ctx.later = total, postponed()
        return ops.linear(axis.all_gather(x, 1) if sequence_parallel else x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        axis, sequence_parallel, total = ctx.axis, ctx.sequence_parallel, ctx.total
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = ops.matmul_grad_input(dy, weight)
            dx = axis.reduce_scatter(dx, 1) if sequence_parallel else axis.all_reduce(dx)
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None, None
        use = "returned" if total is None else total.use(ctx.next_functions[1][0])
        if use == "unused":
            return dx, None, None, None, None
        x = kept_input(ctx, x)  # what made it is gone when a postponed product is computed

        def gathered() -> Tensor:
            whole: Tensor = axis.all_gather(x, 1) if sequence_parallel else x
            return whole

        if total is None or use == "returned":
            dw = ops.matmul_grad_weight(dy, gathered())
        elif ctx.later is None:
            total.add(dy, gathered())
        else:
            ctx.later.append(lambda: total.add(dy, gathered()))
        return dx, dw, None, None, None


def column_matmul(
    x: Tensor,
    weight: Tensor,
    axis: Axis,
    sequence_parallel: bool,
    total: GradientSum | None = None,
) -> Tensor:
    """A column-parallel product: [B,s,D] (or [B,S,D]), [f,D] -> [B,S,f]."""
    summed = total is not None and torch.is_grad_enabled()
    if axis.size == 1 and not summed and not is_made_again(x):
        return ops.linear(x, weight)
    return regions.apply(_ColumnMatmul, x, weight, axis, sequence_parallel, total)


class _Lookup(torch.autograd.Function):
    """Rows of a weight, whose gradient is added to ``total``, if it is to be accumulated."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, total: GradientSum) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.total, ctx.rows = total, weight.shape[0]
        return ops.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None, None]:
        (ids,) = ctx.saved_tensors
        use = ctx.total.use(ctx.next_functions[1][0])
        if use == "accumulated":
            ctx.total.add_rows(dy, ids)
        if use != "returned":
            return None, None, None
        dw = dy.new_zeros(ctx.rows, dy.shape[-1])
        return None, dw.index_add_(0, ids.flatten(), dy.flatten(0, -2)), None


LOCAL = Solo("local")  # the axis of a product without a collective


class ParallelLayer(nn.Module):
    """A layer with a cut ``weight``: a parameter, or in a ``store`` that makes it when it is used.

    With a store the parameter is on the meta device and stands for name, shape and dtype.
    """

    weight: nn.Parameter
    store: Store | None = None
    gradient_sum: GradientSum | None = None  # where an optimizer sums the weight's gradient
    tp: Axis
    sequence_parallel: bool

    def dense(self) -> Tensor:
        """The weight to compute with: [f, D]."""
        return self.weight if self.store is None else self.store.weight()

    def project(self, x: Tensor) -> Tensor:
        """The column-parallel product with the weight: [B,s,D] -> [B,S,f]."""
        return column_matmul(x, self.dense(), self.tp, self.sequence_parallel, self.gradient_sum)


class ColumnLinear(ParallelLayer):
    """Rows of the weight cut over ranks: x_BsD -> y_BSf, one matmul for all blocks.

    ``blocks`` are the projections stacked in the weight, for example q, k and v.
    """

    def __init__(
        self,
        blocks: tuple[Block, ...],
        in_features: int,
        tp: Axis,
        sequence_parallel: bool,
        like: Tensor,
    ) -> None:
        super().__init__()
        self.tp, self.sequence_parallel, self.shard = tp, sequence_parallel, Shard(0, blocks)
        whole = (sum(block.size for block in blocks), in_features)
        self.weight = nn.Parameter(like.new_empty(local_shape(whole, self.shard, tp.size)))

    def forward(self, x_BsD: Tensor) -> Tensor:
        return self.project(x_BsD)


class RowLinear(ParallelLayer):
    """Columns of the weight cut over ranks: x_BSf -> y_BsD, summed over ranks."""

    def __init__(
        self, block: Block, out_features: int, tp: Axis, sequence_parallel: bool, like: Tensor
    ) -> None:
        super().__init__()
        self.tp, self.sequence_parallel, self.shard = tp, sequence_parallel, Shard(1, (block,))
        whole = (out_features, block.size)
        self.weight = nn.Parameter(like.new_empty(local_shape(whole, self.shard, tp.size)))

    def forward(self, x_BSf: Tensor) -> Tensor:
        return self.reduced(self.partial(x_BSf))

    def partial(self, x_BSf: Tensor) -> Tensor:
        """This rank's part of the sum: x_BSf -> z_BSD."""
        return column_matmul(x_BSf, self.dense(), LOCAL, False, self.gradient_sum)

    def reduced(self, z_BSD: Tensor) -> Tensor:
        """The sum over ranks: z_BSD -> y_BsD."""
        return regions.leave(z_BSD, self.tp, self.sequence_parallel)


class VocabEmbedding(ParallelLayer):
    """Rows of the vocabulary cut over ranks: ids_BS -> x_BsD.

    A rank looks up its own run of ids and leaves zeros elsewhere; the sum over ranks is the whole.
    The vocabulary is padded with zero rows to a multiple of the degree.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, tp: Axis, sequence_parallel: bool, like: Tensor
    ) -> None:
        super().__init__()
        self.tp, self.sequence_parallel = tp, sequence_parallel
        self.shard = Shard(0, (Block(vocab_size, pad=True),))
        shape = local_shape((vocab_size, hidden_size), self.shard, tp.size)
        self.weight = nn.Parameter(like.new_empty(shape))

    def forward(self, ids_BS: Tensor) -> Tensor:
        if self.tp.size == 1:
            return self.look_up(ids_BS)
        local_BS, elsewhere_BS = local_ids(ids_BS, self.weight.shape[0], self.tp)
        x_BSD = self.look_up(local_BS) * ~elsewhere_BS.unsqueeze(-1)
        return regions.leave(x_BSD, self.tp, self.sequence_parallel)

    def look_up(self, ids: Tensor) -> Tensor:
        """Rows of this rank's share of the weight: integers [...] -> [..., D]."""
        total = self.gradient_sum
        if total is None or ids.device.type != "cpu" or not torch.is_grad_enabled():
            return ops.embedding(ids, self.dense())  # on GPUs adding rows has no fixed order
        return regions.apply(_Lookup, ids, self.dense(), total)


# Layers with a weight that ``Llama.init`` draws; other modules initialise their own parameters.
PARALLEL_LAYERS = (ColumnLinear, RowLinear, VocabEmbedding)


def sharded_parameters(
    model: nn.Module, tp: Axis, holds: Callable[[str], bool], tied: Collection[str] = ()
) -> ShardedParameters:
    """Every parameter of a module, each with the cut that its owner's ``shard`` declares.

    Tied parameters have one name.  ``holds`` says which names of a whole model belong here, and
    ``tied`` which of them on another stage of a pipeline as well.
    Raises ConfigError for a declaration that does not fit.
    """
    found: dict[str, ShardedParameter] = {}
    layers: dict[str, ParallelLayer] = {}
    for above, module in model.named_modules():
        for leaf, tensor in module.named_parameters(recurse=False):
            name = f"{above}.{leaf}".lstrip(".")
            if leaf == "weight" and type(module) in PARALLEL_LAYERS:
                assert isinstance(module, ParallelLayer)
                layers[name] = module
            how = declared_cut(module, name, leaf, tensor.shape, tp.size)
            found[name] = ShardedParameter(tensor, how)
    once = dict(model.named_parameters())
    named = {name: found[name] for name in once}
    return ShardedParameters(named, tp.size, tp.rank, holds, layers, tied)


def local_ids(ids: Tensor, rows: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """Ids counted from this rank's first row, and where they belong to another rank (there 0)."""
    local = ids - axis.rank_index * rows
    first = torch.zeros_like(local)
    elsewhere = (local < first) | (local >= first + rows)
    return torch.where(elsewhere, first, local), elsewhere
