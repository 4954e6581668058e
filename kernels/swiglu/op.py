"""SwiGLU that saves only its input.

Autograd would keep silu(gate) for backward and join the two gradients by a copy.  Here backward
computes silu again and writes both gradients into the halves of one buffer::

    dgate = dy * up * silu'(gate)        dup = dy * silu(gate)

The result too is made again, by ``ctx.again``, for the backward of the matrix product that it goes
into (``llamax.parallel.tensor_parallel``).

Source: Shazeer 2020, "GLU variants improve Transformer", equation 6.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def gated(gate_up: Tensor) -> Tensor:
    """The result, computed in fp32 at least."""
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate.to(wide)).mul_(up).to(gate_up.dtype)


class SwiGLU(torch.autograd.Function):
    """SwiGLU with an explicit backward."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.again = gated
        return gated(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = vars(ctx).pop("unpacked", None) or ctx.saved_tensors
        wide = torch.promote_types(gate_up.dtype, torch.float32)
        gate, up = gate_up.to(wide).chunk(2, dim=-1)
        dy = dy.to(wide)
        dgate_up = torch.empty(gate_up.shape, dtype=wide, device=gate_up.device)
        dgate, dup = dgate_up.chunk(2, dim=-1)
        torch.mul(dy, up, out=dgate)
        torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        torch._C._nn.silu(gate, out=dup).mul_(dy)  # type: ignore[call-arg]
        return dgate_up.to(gate_up.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of the two halves of the last dim: [..., 2F] -> [..., F]."""
    if not torch.is_grad_enabled():
        return gated(gate_up)
    y: Tensor = SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]
    return y
