"""A stand-in for the attention kernels of a NeuronCore: their tensors without their arithmetic.

A trace with it has what the kernels' callers hold for backward (kernels/attention/nki_op.py; with
context ranks nki_kernel.py): q, k and v, document numbers, the output, and one number for each
row.  Such a program can be read for its memory, and not be run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llamax import ops
from llamax.backends.tracing import opaque
from llamax.config.constants import FLASH_MULTIPLE, NKI_MULTIPLE, flash_refusal, nki_refusal
from llamax.config.schema import Config
from llamax.parallel.collectives import Axis
from llamax.tools.audit import on_chip_loss


def refusal(config: Config) -> str:
    """Why no kernel of a NeuronCore computes the attention of a run; empty where one does."""
    data, model, context = config.data, config.model, config.parallel.context
    if context == 1:
        return nki_refusal(data.sequence_length, model.head_dim)
    documents = data.separate_documents
    return flash_refusal(data.sequence_length, model.head_dim, documents, context)


def notes(config: Config) -> Iterator[str]:
    """A note on the kernel of attention, or on why there is none."""
    length, context = config.data.sequence_length, config.parallel.context
    why = refusal(config)
    if not why:
        kernel = "the flash kernel" if context > 1 else "llamax's NKI kernel"
        yield (
            f"attention is traced as plain operations of llamax; on NeuronCores {kernel} replaces "
            "them, and memory is estimated with its tensors"
        )
        return
    remedy = ""
    if context > 1 and length % (2 * context * FLASH_MULTIPLE):
        remedy = "; use fewer context ranks"
    elif context == 1 and length % NKI_MULTIPLE:
        remedy = f"; use {max(1, round(length / NKI_MULTIPLE)) * NKI_MULTIPLE}"
    yield f"{why}, so attention computes every pair of tokens without a kernel{remedy}"


class Flash(torch.autograd.Function):
    """q [B, S, H, E], k and v [B, S, K, E] -> [B, S, H, E], as one opaque instruction each way."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        """The output, with the tensors that the kernels' caller keeps for backward."""
        B, S, H, E = q.shape
        seen = [] if documents is None else [documents]
        shapes = [(B, H, S, E), (B, H, S)]
        out, row = opaque("flash", [q, k, v, *seen], shapes, [q.dtype, torch.float32])
        ctx.save_for_backward(q, k, v, documents, out, row)
        mixed: Tensor = out.transpose(1, 2)
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        saved = [x for x in ctx.saved_tensors if x is not None]
        shapes = [tuple(x.shape) for x in saved[:3]]
        return *opaque("flash", [*saved, *grads], shapes, [saved[0].dtype] * 3), None


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
    """The shapes of ``ops.attention``: [B, S, H, E], 2 x [B, S, K, E], [B, S] -> [B, S, H, E]."""
    out: Tensor = Flash.apply(q, k, v, documents)  # type: ignore[no-untyped-call]
    return out


class RotatedFlash(torch.autograd.Function):
    """qkv [B, S, (H + 2 K) E] and rotary tables -> [B, S, H E], opaque each way."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, documents: Tensor | None
    ) -> Tensor:
        """The output, with the tensors that the kernels' caller keeps for backward."""
        (B, S, _), E = qkv.shape, cos.shape[-1]
        seen = [] if documents is None else [documents]
        shapes = [(B, S, heads * E), (B, heads, S), tuple(qkv.shape)]
        dtypes = [qkv.dtype, torch.float32, qkv.dtype]
        out, row, rotated = opaque("flash", [qkv, cos, sin, *seen], shapes, dtypes)
        ctx.save_for_backward(rotated, cos, sin, documents, out, row)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of qkv."""
        saved = [x for x in ctx.saved_tensors if x is not None]
        (gradient,) = opaque("flash", [*saved, *grads], [tuple(saved[0].shape)], [saved[0].dtype])
        return gradient, None, None, None, None


def rotated_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, documents: Tensor | None = None
) -> Tensor:
    """The shapes of ``ops.rotated_attention``."""
    inputs = (qkv, cos, sin, heads, documents)
    out: Tensor = RotatedFlash.apply(*inputs)  # type: ignore[no-untyped-call]
    return out


class Block:
    """A block of ranks that share sequences, opaque each way (``kernels/attention/blocks.py``)."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, numbers: None
    ) -> tuple[Tensor, Tensor]:
        """The shapes of the output and of the log-sum-exps."""
        shapes = [tuple(q.shape), (*q.shape[:3], 1)]
        out, lse = opaque("flash", [q, k, v], shapes, [q.dtype, torch.float32])
        return out, lse

    def backward(
        self, rows: Any, k: Tensor, v: Tensor, causal: bool, numbers: None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The shapes of the gradients of q, k and v."""
        inputs = [rows.q, k, v, rows.out, rows.dout, rows.lse]
        shapes = [tuple(x.shape) for x in inputs[:3]]
        dq, dk, dv = opaque("flash", inputs, shapes, [k.dtype] * 3)
        return dq, dk, dv


def by_blocks(q: Tensor, kv: Tensor, documents: Tensor | None, ranks: Axis) -> Tensor:
    """``ops.attention_by_blocks`` without documents, of blocks that are opaque."""
    out: Tensor = ops.load("attention.blocks:attention")(q, kv, None, ranks, Block())
    return out


STAND_INS: dict[str, Callable[..., Tensor]] = {
    "attention": attention,
    "rotated_attention": rotated_attention,
    "attention_by_blocks": by_blocks,
}


@contextmanager
def kernels_stand_in(attends: bool = True) -> Iterator[None]:
    """Trace the kernels as stand-ins in the block: of attention, if it ``attends`` by them, and of
    the loss, where they accept it."""
    table = dict(ops.TABLE)
    for name, kernel in STAND_INS.items() if attends else ():
        ops.TABLE[name] = (ops.Row("stand-in", lambda *_: True, kernel), *table[name])
    for name in ("statistics", "gradients"):
        row = ops.Row("stand-in", on_chip_loss.accepts, getattr(on_chip_loss, name))
        ops.TABLE[f"logit_{name}"] = (row, *table[f"logit_{name}"])
    try:
        yield
    finally:
        ops.TABLE.update(table)
