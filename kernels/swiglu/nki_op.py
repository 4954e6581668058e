"""SwiGLU by the NKI kernels of this folder, with gradients.

``ops`` does not choose it: the README has the tally.  The simulator executed the kernels;
neuronx-cc has not compiled them, and they have not run on Trainium.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamax.config.constants import NKI_MULTIPLE as TILE
from llamax.kernels.attention.nki_op import launch


class SwiGLU(torch.autograd.Function):
    """SwiGLU; saves its input alone."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        rows = gate_up.reshape(-1, gate_up.shape[-1]).contiguous()
        y: Tensor = launch("swiglu.nki_forward", "swiglu_forward", rows)
        return y.view(*gate_up.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        rows = [x.reshape(-1, x.shape[-1]).contiguous() for x in (dy.to(gate_up.dtype), gate_up)]
        gradient: Tensor = launch("swiglu.nki_backward", "swiglu_backward", *rows)
        return gradient.view(gate_up.shape)


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of the two halves of the last dim: [..., 2F] -> [..., F]."""
    y: Tensor = SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]
    return y


def refusal(tokens: int) -> str:
    """Why the kernels cannot compute so many tokens; empty where they can."""
    return f"{tokens} tokens are not a multiple of {TILE}" if tokens % TILE else ""
