"""bf16 matrix products on a CPU without bf16 units: stored in bf16, multiplied in fp32.

Without AVX512-BF16, AMX or their like, a bf16 product runs a scalar loop: about 1 GFLOP/s for the
gradient of the input against 170 for fp32.  Widening the operands costs one pass over each and
loses nothing, since every bf16 number is an fp32 number.  What lives from forward to backward stays
bf16; the wide copies die with the product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dy = dy.float()
        dx = grad_input(dy, weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        dweight = grad_weight(dy, x).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dx, dweight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``: [..., in], [out, in] -> [..., out], stored as x is."""
    y: Tensor = Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    return y


def grad_input(dy: Tensor, weight: Tensor) -> Tensor:
    """[..., out], [out, in] -> [..., in], stored as dy is."""
    return (dy.float() @ weight.float()).to(dy.dtype)


def grad_weight(dy: Tensor, x: Tensor) -> Tensor:
    """[..., out], [..., in] -> [out, in] in fp32: rounding the sum over rows only loses digits."""
    return dy.float().flatten(0, -2).t() @ x.float().flatten(0, -2)
