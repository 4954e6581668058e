"""Cross-entropy over a vocabulary that is cut over ranks, without the logits ever existing whole.

For token t with label y and logits z over the whole vocabulary, the loss is log sum exp z - z_y.
Each rank holds z for its own rows; three numbers per token cross ranks: the maximum, then the sum
of exponentials and the label's logit together (Shoeybi et al. 2019, section 3).

The output matmul is part of the loss.  Tokens are taken in chunks: one chunk's logits [t, v] are
made in fp32, turned in place into their gradient softmax(z) - onehot(y), multiplied into the
gradients of input and weight, and dropped before the next chunk.  Nothing of size tokens x
vocabulary is kept, and nothing is computed twice: the loss is the root of backward, so its
gradient is known up to one scalar, which backward multiplies in, in place (as in Hsu et al. 2024,
section 3.2, here cut over ranks); a second backward through the same loss is an error.  In float16
the gradient of the logits, whose elements are probabilities, is multiplied by ``LOSS_GAIN`` before
it is rounded, and backward divides by it.

Where ``ops`` has kernels that keep logits on the chip, they compute them twice instead: forward
gives the three numbers of each token, and backward the gradients from the sum over all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamax import ops
from llamax.config.choices import EAGER_BACKENDS
from llamax.config.constants import loss_chunk_tokens
from llamax.config.hidden import HIDDEN
from llamax.ops import IGNORE_INDEX
from llamax.parallel import regions
from llamax.parallel.collectives import Axis
from llamax.parallel.tensor_parallel import local_ids

PRODUCT_ROWS = 2048  # of the vocabulary at once, on a CPU: MKL keeps a copy of what it packs
LOSS_GAIN = 256.0  # a label's gradient, at most 1, stays far below the largest float16


class _VocabParallelLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels_BS: Tensor,
        axis: Axis,
        vocab_size: int,
        sequence_parallel: bool,
        chunk_tokens: int,
    ) -> Tensor:
        x_BSD = axis.all_gather(x, 1) if sequence_parallel else x
        x_TD, labels_T = x_BSD.flatten(0, 1), labels_BS.flatten()
        rows = weight.shape[0]
        want_dx, want_dw = ctx.needs_input_grad[:2]
        dx_TD = None
        if want_dx:  # chunk by chunk, in the place of what was gathered
            gathered = sequence_parallel and axis.size > 1 and x.device.type in EAGER_BACKENDS
            dx_TD = x_TD if gathered else torch.empty_like(x_TD)
        dw = torch.zeros_like(weight, dtype=torch.float32) if want_dw else None
        multiplied = weight.to(ops.product_dtype(weight))
        padding = _padding(rows, vocab_size, axis)
        total = x.new_zeros((), dtype=torch.float32)
        gain = LOSS_GAIN if x.dtype == torch.float16 else 1.0

        logits = None  # on a CPU one block for all chunks: a new one may not fit where the last was
        if x.device.type == "cpu" and multiplied.dtype == torch.float32:
            logits = multiplied.new_empty(min(chunk_tokens, len(x_TD)), rows)

        def add(chunk: slice) -> Tensor:  # its logits go before those of the next come
            x_tD, labels_t = x_TD[chunk].to(multiplied.dtype), labels_T[chunk]
            if logits is None:
                logits_tv = torch.mm(x_tD, multiplied.T).float()
            else:
                logits_tv = logits[: len(x_tD)]
                for part in range(0, rows, PRODUCT_ROWS):
                    some = slice(part, part + PRODUCT_ROWS)
                    torch.mm(x_tD, multiplied[some].T, out=logits_tv[:, some])
            if padding is not None:
                logits_tv.masked_fill_(padding, torch.full((), HIDDEN, device=x.device))
            counted_t = _counted(labels_t)
            label_t, elsewhere_t = local_ids(labels_t, rows, axis)
            loss_t, sum_t = _losses(logits_tv, label_t, elsewhere_t, axis)
            loss = torch.where(counted_t, loss_t, torch.zeros_like(loss_t)).sum()
            if dx_TD is None and dw is None:
                return loss
            logits_tv.mul_((counted_t / sum_t).unsqueeze(1))
            onehot_t = (counted_t & ~elsewhere_t).to(logits_tv.dtype)
            ops.add_at_columns(logits_tv, label_t, -onehot_t)
            if gain != 1.0:
                logits_tv.mul_(gain)
            dlogits_tv = logits_tv.to(multiplied.dtype)
            if dw is not None and dw.dtype == x_tD.dtype:
                dw.addmm_(dlogits_tv.T, x_tD)
            elif dw is not None:
                dw.add_(dlogits_tv.T @ x_tD)
            if dx_TD is not None:
                dx_TD[chunk] = dlogits_tv @ multiplied
            return loss

        for start in range(0, x_TD.shape[0], chunk_tokens):
            total = total + add(slice(start, start + chunk_tokens))
        logits = dx = None
        if dx_TD is not None:
            dx = dx_TD.view_as(x_BSD)
            dx = axis.reduce_scatter(dx, 1) if sequence_parallel else axis.all_reduce(dx)
        ctx.save_for_backward(dx, dw)
        ctx.weight_dtype, ctx.gain = weight.dtype, gain
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        if ctx.gain != 1.0:
            dtotal = dtotal / ctx.gain
        if dx is not None:
            dx.mul_(dtotal)
        if dw is not None:
            dw = dw.mul_(dtotal).to(ctx.weight_dtype)
        return dx, dw, None, None, None, None, None


class _LossOnChip(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels_BS: Tensor,
        axis: Axis,
        vocab_size: int,
        sequence_parallel: bool,
    ) -> Tensor:
        x_BSD = axis.all_gather(x, 1) if sequence_parallel else x
        x_TD, labels_T = x_BSD.flatten(0, 1), labels_BS.flatten()
        counted_T = _counted(labels_T)
        label_T, elsewhere_T = local_ids(labels_T, weight.shape[0], axis)
        column_T = torch.where(counted_T & ~elsewhere_T, label_T, torch.full_like(label_T, -1))
        padding = _padding(weight.shape[0], vocab_size, axis)
        statistics = ops.kernel("logit_statistics", x_TD, weight, labels_T)
        top_T, sum_T, at_label_T = statistics(x_TD, weight, column_T, padding)
        largest_T = axis.all_reduce(top_T, "max")
        sum_T = sum_T * (top_T - largest_T).exp()
        sum_T, at_label_T = axis.all_reduce(torch.stack((sum_T, at_label_T)))
        lse_T = sum_T.log() + largest_T
        loss_T = torch.where(counted_T, lse_T - at_label_T, torch.zeros_like(lse_T))
        lse_T = torch.where(counted_T, lse_T, torch.full_like(lse_T, -HIDDEN))
        ctx.save_for_backward(x_BSD, weight, column_T, lse_T, padding)
        ctx.axis, ctx.sequence_parallel = axis, sequence_parallel
        return loss_T.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        x_BSD, weight, column_T, lse_T, padding = ctx.saved_tensors
        x_TD, (want_dx, want_dw) = x_BSD.flatten(0, 1), ctx.needs_input_grad[:2]
        gradients: Any = ops.kernel("logit_gradients", x_TD, weight, column_T)
        dx, dw = gradients(x_TD, weight, column_T, lse_T, padding, want_dw)
        if want_dx:
            dx, axis = dx.view_as(x_BSD), ctx.axis
            dx = axis.reduce_scatter(dx, 1) if ctx.sequence_parallel else axis.all_reduce(dx)
            dx = dx * dtotal
        dw = (dw * dtotal).to(weight.dtype) if want_dw else None
        return dx if want_dx else None, dw, None, None, None, None


def _losses(
    logits_tv: Tensor, label_t: Tensor, elsewhere_t: Tensor, axis: Axis
) -> tuple[Tensor, Tensor]:
    """Loss per token, and the sum of exponentials; ``logits_tv`` becomes exp(logits - max)."""
    top_t = axis.all_reduce(logits_tv.amax(1), "max")
    logits_tv.sub_(top_t.unsqueeze(1))
    at_label_t = ops.at_columns(logits_tv, label_t)
    at_label_t = torch.where(elsewhere_t, torch.zeros_like(at_label_t), at_label_t)
    sum_t, at_label_t = axis.all_reduce(torch.stack((logits_tv.exp_().sum(1), at_label_t)))
    return sum_t.log() - at_label_t, sum_t


def _counted(labels: Tensor) -> Tensor:
    return labels != torch.full_like(labels, IGNORE_INDEX)


def _padding(rows: int, vocab_size: int, axis: Axis) -> Tensor | None:
    """True at this rank's rows beyond the vocabulary; None where the degree divides it."""
    if rows * axis.size == vocab_size:
        return None
    index = axis.rank_index
    row_v = torch.arange(rows, dtype=index.dtype, device=index.device) + index * rows
    return row_v >= torch.full_like(row_v, vocab_size)


def vocab_parallel_loss(
    x: Tensor,
    weight_vD: Tensor,
    labels_BS: Tensor,
    axis: Axis,
    vocab_size: int,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy in nats and the number of counted tokens, both 0-d float32.

    [B,s,D] (sequence parallel) or [B,S,D], [v,D], [B,S] -> loss sum, count.  Labels of
    ``IGNORE_INDEX`` count for nothing.  ``chunk_tokens`` defaults to all of them where kernels keep
    logits on the chip, else to about 64 MiB of fp32 logits, on a CPU to 256 tokens at most.
    """
    if chunk_tokens is None and ops.has_kernel("logit_statistics", x, weight_vD, labels_BS):
        whole = x, weight_vD, labels_BS, axis, vocab_size, sequence_parallel
        return regions.apply(_LossOnChip, *whole), _counted(labels_BS).float().sum()
    if chunk_tokens is None:
        chunk_tokens = loss_chunk_tokens(weight_vD.shape[0], on_cpu=x.device.type == "cpu")
    total = regions.apply(
        _VocabParallelLoss,
        x,
        weight_vD,
        labels_BS,
        axis,
        vocab_size,
        sequence_parallel,
        chunk_tokens,
    )
    return total, _counted(labels_BS).float().sum()
