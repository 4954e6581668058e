"""The autograd regions of tensor and sequence parallelism, and their transposes.

A collective in the forward pass meets its transpose in the backward pass (Shoeybi et al. 2019,
figure 3; Korthikanti et al. 2022, figure 5).  ``x_BSD`` is the same on every rank of the axis,
``x_BsD`` holds this rank's run of the sequence:

======== ============================ ============================ =======================
region   forward                      backward                     changes
======== ============================ ============================ =======================
reduce   all-reduce                   identity                     partial sums -> x_BSD
scatter  reduce-scatter along S       all-gather along S           partial sums -> x_BsD
join     all-gather along a dim       share of the gradient        shares -> whole
split    share along a dim            all-gather                   whole -> shares
collect  all-gather along a dim       reduce-scatter               shares -> whole
======== ============================ ============================ =======================

Ranks do the same with what was joined, and different things with what was collected, so that its
gradient is the sum of theirs.

The transposes of ``reduce`` and ``scatter`` (copy in, gather in) belong to the column-parallel
layer, which fuses them with its matmul to save only the sharded input (``tensor_parallel.py``).
Collectives are functional: no tensor that autograd saved is ever written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamax.parallel.collectives import Axis


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return axis.all_reduce(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return axis.reduce_scatter(x, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return ctx.axis.all_gather(dy, ctx.dim), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return axis.all_gather(x, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return share(dy, ctx.axis, ctx.dim), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return share(x, axis, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return ctx.axis.all_gather(dy, ctx.dim), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return axis.all_gather(x, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return ctx.axis.reduce_scatter(dy, ctx.dim), None, None


def share(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's share of ``x`` along ``dim``; the rank is a tensor: every rank traces alike."""
    parts: Tensor = x.unflatten(dim, (axis.size, -1)).movedim(dim, 0)
    return parts.index_select(0, axis.rank_index).squeeze(0)


def leave(x: Tensor, axis: Axis, sequence_parallel: bool) -> Tensor:
    """The sum of partial results: [B,S,D] -> [B,s,D] with sequence parallelism, else [B,S,D]."""
    if axis.size == 1:
        return x
    return apply(_Scatter, x, axis, 1) if sequence_parallel else apply(_Reduce, x, axis)


def join(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """The whole tensor from all shares along ``dim``, for computation that every rank repeats."""
    return x if axis.size == 1 else apply(_Join, x, axis, dim)


def split(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's share along ``dim`` of a tensor that is the same on every rank."""
    return x if axis.size == 1 else apply(_Split, x, axis, dim)


def collect(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """The whole tensor from all shares along ``dim``, for a computation of each rank's own."""
    return x if axis.size == 1 else apply(_Collect, x, axis, dim)


def apply(region: type[torch.autograd.Function], *arguments: object) -> Tensor:
    """``region.apply`` with a type."""
    result: Tensor = region.apply(*arguments)
    return result
