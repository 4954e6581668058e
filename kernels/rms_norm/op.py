"""RMSNorm with a backward in six passes and one buffer.

With r = rsqrt(mean(x^2) + eps) and g = dy * weight::

    dx      = r * (g - x * sum(g * x) * r^2 / D)
    dweight = sum over rows of dy * x * r

Both sums come from one product dy * x: multiplied by r from the left it gives dweight, multiplied
by weight from the right it gives sum(g * x).  Its buffer then becomes dx.  Saved are x, weight and
r (one number for each row), from which ``ctx.again`` makes the result again for the backward of the
matrix product that it goes into (``llamax.parallel.tensor_parallel``).

Source: Zhang and Sennrich 2019, equation 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def normalized(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result, and the factor of each row, at least fp32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return scaled(x, weight, scale), scale


def scaled(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The result, from the factor of each row."""
    return (x * scale).to(x.dtype).mul_(weight)


class RMSNorm(torch.autograd.Function):
    """RMSNorm with an explicit backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = normalized(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.again = scaled
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = vars(ctx).pop("unpacked", None) or ctx.saved_tensors
        width = x.shape[-1]
        dtype = x.dtype
        x, dy, wide_weight = (t.to(scale.dtype) for t in (x, dy, weight))
        buffer = torch.mul(dy, x)
        rows = buffer.view(-1, width)
        dweight = (scale.view(1, -1) @ rows).view(width)
        along = (rows @ wide_weight).view_as(scale) * scale**3 / width
        dx = torch.mul(dy, wide_weight, out=buffer).mul_(scale).addcmul_(x, along, value=-1)
        return dx.to(dtype), dweight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)``: [..., D], [D] -> [..., D]."""
    if not torch.is_grad_enabled():
        return normalized(x, weight, eps)[0]
    y: Tensor = RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y
