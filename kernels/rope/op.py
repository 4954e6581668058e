"""Rotary embedding in the half-split layout, in three passes without temporaries.

Pair i of a head is (x[i], x[i + E/2]) and is rotated by the angle of its position::

    y[:E/2] = x[:E/2] * cos - x[E/2:] * sin
    y[E/2:] = x[E/2:] * cos + x[:E/2] * sin

The transpose of a rotation is the rotation by the opposite angle, so backward is the same code with
the opposite sign, and only the tables are saved.

Source: Su et al. 2021, section 3.4.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """``x`` [B, S, H, E] rotated by ``sign`` times the angles of the tables [B or 1, S, E]."""
    y = torch.mul(x, cos.unsqueeze(2))
    (y1, y2), (x1, x2), (sin1, sin2) = (t.chunk(2, dim=-1) for t in (y, x, sin.unsqueeze(2)))
    y1.addcmul_(x2, sin1, value=-sign)
    y2.addcmul_(x1, sin2, value=sign)
    return y.to(x.dtype)


class Rotate(torch.autograd.Function):
    """Rotary embedding with an explicit backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotated(dy, cos, sin, -1), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split: [B, S, H, E], [B or 1, S, E] twice -> [B, S, H, E]."""
    if not torch.is_grad_enabled():
        return rotated(x, cos, sin, 1)
    y: Tensor = Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y
