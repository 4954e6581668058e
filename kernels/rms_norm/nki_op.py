"""RMSNorm by the NKI kernels of this folder, with gradients.

``ops`` does not choose it: a norm moves the same bytes as the compiler's own operation.  The
simulator executed the kernels; neuronx-cc has not compiled them, and they have not run on Trainium.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamax.config.constants import NKI_MULTIPLE as TILE
from llamax.kernels.attention.nki_op import launch

WIDEST = 8192  # features: nine rows of them fill SBUF


class RMSNorm(torch.autograd.Function):
    """RMSNorm; saves x, the weight and one number for each token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        small = torch.full((TILE, 1), eps, dtype=torch.float32, device=x.device)
        inputs = rows, _spread(weight), small
        y, inverses = launch("rms_norm.nki_forward", "rms_norm_forward", *inputs)
        ctx.save_for_backward(x, weight, inverses)
        normalised: Tensor = y.view(x.shape)
        return normalised

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverses = ctx.saved_tensors
        rows = [t.reshape(-1, x.shape[-1]).contiguous() for t in (dy.to(x.dtype), x)]
        inputs = (*rows, _spread(weight), inverses)
        dx, columns = launch("rms_norm.nki_backward", "rms_norm_backward", *inputs)
        return dx.view(x.shape), columns.t().reshape(-1).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)``: [..., D], [D] -> [..., D]."""
    y: Tensor = RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


def refusal(tokens: int, width: int) -> str:
    """Why the kernels cannot normalise so many tokens of this width; empty where they can."""
    if tokens % TILE:
        return f"{tokens} tokens are not a multiple of {TILE}"
    if width % TILE or width > WIDEST:
        return f"the width {width} is not a multiple of {TILE} up to {WIDEST}"
    return ""


def _spread(weight: Tensor) -> Tensor:
    """The weight in every partition: [D] -> [128, D]."""
    return weight.expand(TILE, -1).contiguous()
