"""Matrix products in 16 bits on a CPU without units for them, computed in float32.

Without AVX512-BF16, AMX or similar units a bfloat16 product runs a scalar loop: about 1 GFLOP/s for
the gradient of the input, compared with 170 in float32.  Widening the operands costs one pass over
each and is exact, as every bfloat16 or float16 number is a float32 number.  Tensors saved for
backward stay narrow; the wide copies are freed after the product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Linear(torch.autograd.Function):
    """A matrix product with operands in 16 bits and arithmetic in float32."""

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
    """``x @ weight.T``: [..., in], [out, in] -> [..., out], in the dtype of x."""
    y: Tensor = Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    return y


def grad_input(dy: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the input: [..., out], [out, in] -> [..., in], in the dtype of dy."""
    return (dy.float() @ weight.float()).to(dy.dtype)


def grad_weight(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of the weight: [..., out], [..., in] -> [out, in], in float32."""
    return dy.float().flatten(0, -2).t() @ x.float().flatten(0, -2)
