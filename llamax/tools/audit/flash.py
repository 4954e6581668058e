"""A stand-in for Neuron's flash attention kernel, with its tensors and without its arithmetic.

A trace with it has what the kernel's adapter (kernels/attention/nki_kernel.py) holds: q, k and v
with repeated heads, the output and one number for each row, kept for backward.  Such a program can
be read for its memory, and not be run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llamax import ops
from llamax.backends.tracing import opaque


class Flash(torch.autograd.Function):
    """[B, H, E, S] three times -> [B, H, S, E], as one opaque instruction each way."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output, with the shapes that the kernel keeps for backward."""
        B, H, E, S = q.shape
        out, row = opaque("flash", [q, k, v], [(B, H, S, E), (B, H, S)], [q.dtype, torch.float32])
        ctx.save_for_backward(q, k, v, out, row)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Gradients of q, k and v."""
        q, *others = ctx.saved_tensors
        return tuple(opaque("flash", [q, *others, *grads], [tuple(q.shape)] * 3, [q.dtype] * 3))


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
    """The shapes of ``ops.attention``: [B, S, H, E], 2 x [B, S, K, E], None -> [B, S, H, E]."""
    B, S, H, E = q.shape
    shape = B, S, k.shape[2], H // k.shape[2], E
    repeated = (x[:, :, :, None].expand(shape).flatten(2, 3) for x in (k, v))
    q_BHES, k_BHES, v_BHES = (x.permute(0, 2, 3, 1) for x in (q, *repeated))
    out: Tensor = Flash.apply(q_BHES, k_BHES, v_BHES)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2)


class Blocks(torch.autograd.Function):
    """q [B, S / n, H, E], k and v [B, S, K, E] -> [B, S / n, H, E], opaque each way."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output, with the shapes that the kernel keeps for backward."""
        shapes = [tuple(q.shape), tuple(q.shape[:3])]
        out, row = opaque("flash", [q, k, v], shapes, [q.dtype, torch.float32])
        ctx.save_for_backward(q, k, v, out, row)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Gradients of q, k and v."""
        saved = ctx.saved_tensors
        shapes = [tuple(x.shape) for x in saved[:3]]
        parts = opaque("flash", [*saved, *grads], shapes, [torch.float32] * 3)  # sums of blocks
        return tuple(part.to(saved[0].dtype) for part in parts)


def by_blocks(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, rank: Tensor) -> Tensor:
    """The shapes of ``ops.attention_by_blocks``, without documents."""
    out: Tensor = Blocks.apply(q, k, v)  # type: ignore[no-untyped-call]
    return out


@contextmanager
def flash_stand_in() -> Iterator[None]:
    """Trace attention as the stand-in while the block runs."""
    table = dict(ops.TABLE)
    for name, kernel in (("attention", attention), ("attention_by_blocks", by_blocks)):
        ops.TABLE[name] = (ops.Row("stand-in", lambda *_: True, kernel), *table[name])
    try:
        yield
    finally:
        ops.TABLE.update(table)
