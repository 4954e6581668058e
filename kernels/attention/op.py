"""Causal attention on a CPU by batched matrix products over blocks of queries.

A block of queries is multiplied with all its keys, so the softmax of a row needs no running sums.
Keys masked for every query of the block are skipped::

    queries   keys ->
       |      [d]                d  diagonal block: masked above the diagonal
       v      [x][d]             x  whole block
              [x][x][d]
              [ ][x][x][d]       blank: only keys of other documents, skipped

The queries of the G heads that share a key/value head are stacked into one matrix of G * block
rows.  Exponentials are powers of two, which are about twice as fast on CPUs as powers of e, so the
scale of the scores contains log2(e).  Saved for backward are q, k, v, the output and one number for
each row, L = log2(sum 2^scores).  Backward computes the weights p = 2^(scores - L) again::

    dv = p^T dout      ds = p * (dout v^T - rowsum(dout * out))      dq = ds k      dk = ds^T q

Memory is linear in S: only the scores of one block of queries exist at a time.

Source: Dao et al. 2022, "FlashAttention", sections 3.1 and B.4, without its blocks of keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamax.config.constants import ATTENTION_BLOCK_QUERIES, ATTENTION_SCORES_BYTES


class Block(NamedTuple):
    """The queries [start, stop) and keys [low, high) of one or several sequences.

    ``bias`` (0 or -inf, [stop - start, n]) is added to the scores of the last n keys.
    """

    start: int
    stop: int
    low: int
    high: int
    bias: Tensor


class Attention(torch.autograd.Function):
    """Causal self-attention with an explicit backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        batch, length, heads, width = q.shape
        past, kv = k.shape[1] - length, k.shape[2]
        dtype = torch.promote_types(q.dtype, torch.float32)
        scale = width**-0.5 * math.log2(math.e)
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty((batch, kv, heads // kv, length), dtype=dtype)
        for rows in _sequences(q, k, documents, dtype):
            keys, values = _by_head(k[rows], dtype), _by_head(v[rows], dtype)
            for start, stop, low, high, bias in _blocks(length, documents, rows, dtype, past):
                queries = _stack(q[rows, start:stop], kv, dtype)
                scores = _scores(queries, keys[:, low:high], bias, scale)
                largest = scores.amax(-1, keepdim=True)
                weights = scores.sub_(largest).exp2_()
                total = weights.sum(-1, keepdim=True)
                mixed = torch.bmm(weights, values[:, low:high]).div_(total)
                _unstack(mixed, out[rows, start:stop], kv)
                block_lse = lse[rows, :, :, start:stop]
                block_lse.copy_(total.log2_().add_(largest).view(block_lse.shape))
        v = v.contiguous()  # a view would keep the whole of a fused projection
        ctx.save_for_backward(q, k, v, out, lse, documents)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse, documents = ctx.saved_tensors
        length, kv, dtype = q.shape[1], k.shape[2], lse.dtype
        past = k.shape[1] - length
        scale = q.shape[-1] ** -0.5
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        for rows in _sequences(q, k, documents, dtype):
            keys, values = _by_head(k[rows], dtype), _by_head(v[rows], dtype)
            dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
            for start, stop, low, high, bias in _blocks(length, documents, rows, dtype, past):
                queries = _stack(q[rows, start:stop], kv, dtype)
                dmixed = _stack(dout[rows, start:stop], kv, dtype)
                mixed = _stack(out[rows, start:stop], kv, dtype)
                along = mixed.mul_(dmixed).sum(-1, keepdim=True)
                block_lse = lse[rows, :, :, start:stop].reshape(along.shape)
                scores = _scores(queries, keys[:, low:high], bias, scale * math.log2(math.e))
                weights = scores.sub_(block_lse).exp2_()
                dvalues[:, low:high].baddbmm_(weights.mT, dmixed)
                dscores = torch.bmm(dmixed, values[:, low:high].mT).sub_(along).mul_(weights)
                dkeys[:, low:high].baddbmm_(dscores.mT, queries, alpha=scale)
                dqueries = torch.bmm(dscores, keys[:, low:high]).mul_(scale)
                _unstack(dqueries, dq[rows, start:stop], kv)
            dk[rows] = dkeys.view(-1, kv, *dkeys.shape[1:]).transpose(1, 2)
            dv[rows] = dvalues.view(-1, kv, *dvalues.shape[1:]).transpose(1, 2)
        return dq, dk, dv, None


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
    """Causal self-attention: [B, S, H, E], [B, T, K, E] twice, [B, T] or None -> [B, S, H, E].

    The queries are those of the last S of T tokens.
    """
    out: Tensor = Attention.apply(q, k, v, documents)  # type: ignore[no-untyped-call]
    return out


def _sequences(
    q: Tensor, k: Tensor, documents: Tensor | None, dtype: torch.dtype
) -> Iterator[slice]:
    """The sequences computed together: one at a time with documents, which skip different keys."""
    batch, _, heads, _ = q.shape
    together = 1
    if documents is None:
        block_bytes = dtype.itemsize * heads * ATTENTION_BLOCK_QUERIES * k.shape[1]
        together = max(1, ATTENTION_SCORES_BYTES // block_bytes)
    for start in range(0, batch, together):
        yield slice(start, start + together)


def _blocks(
    length: int, documents: Tensor | None, rows: slice, dtype: torch.dtype, past: int = 0
) -> Iterator[Block]:
    """The blocks of queries of the sequences ``rows``, in order, after ``past`` tokens."""
    causal = torch.full((ATTENTION_BLOCK_QUERIES,) * 2, -math.inf, dtype=dtype).triu_(1)
    if documents is not None:
        numbers = documents[rows.start]
        first = _first_of_document(numbers)
    for start in range(0, length, ATTENTION_BLOCK_QUERIES):
        stop = min(start + ATTENTION_BLOCK_QUERIES, length)
        low, high, bias = 0, past + stop, causal[: stop - start, : stop - start]
        if documents is not None:
            low = int(first[past + start : high].min())
            other = numbers[past + start : high, None] != numbers[low:high]
            if other.any():
                wide = torch.zeros(other.shape, dtype=dtype)
                wide[:, past + start - low :] = bias
                bias = wide.masked_fill_(other, -math.inf)
        yield Block(start, stop, low, high, bias)


def _first_of_document(numbers: Tensor) -> Tensor:
    """The index of the first token of every token's document: [S] -> [S]."""
    length = len(numbers)
    unique, inverse = torch.unique(numbers, return_inverse=True)
    first = torch.full(unique.shape, length).scatter_reduce_(
        0, inverse, torch.arange(length), "amin"
    )
    return first[inverse]


def _by_head(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, S, K, E] -> [n * K, S, E]."""
    return x.transpose(1, 2).to(dtype).flatten(0, 1)


def _stack(x: Tensor, kv: int, dtype: torch.dtype) -> Tensor:
    """One matrix for each key/value head, its G query heads stacked: -> [n * K, G * m, E]."""
    n, m, heads, width = x.shape
    stacked = torch.empty((n, kv, heads // kv, m, width), dtype=dtype)
    stacked.copy_(x.unflatten(2, (kv, -1)).permute(0, 2, 3, 1, 4))
    return stacked.view(n * kv, -1, width)


def _unstack(stacked: Tensor, x: Tensor, kv: int) -> None:
    """The inverse of ``_stack``: write [n * K, G * m, E] into x [n, m, H, E]."""
    n, m, heads, width = x.shape
    x.unflatten(2, (kv, -1)).copy_(
        stacked.view(n, kv, heads // kv, m, width).permute(0, 3, 1, 2, 4)
    )


def _scores(queries: Tensor, keys: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Scaled products plus the bias: [n, G * m, E], [n, t, E], [m, c] -> [n, G * m, t]."""
    scores = queries.new_empty((*queries.shape[:2], keys.shape[1]))
    scores.baddbmm_(queries, keys.mT, beta=0, alpha=scale)
    rows, columns = bias.shape
    scores.view(len(scores), -1, rows, scores.shape[-1])[..., -columns:].add_(bias)
    return scores


def one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one query of each sequence to a cache; without a mask to all of it.

    torch's fused kernel takes the query heads of a key/value head for queries of one head, so keys
    and values are read once, not for every query head.
    """
    B, _, H, E = q.shape
    q_BKgE = q.view(B, k.shape[2], -1, E)
    k_BKTE, v_BKTE = k.transpose(1, 2), v.transpose(1, 2)
    mask_B11T = None if mask is None else mask[:, :, None]
    out_BKgE = F.scaled_dot_product_attention(q_BKgE, k_BKTE, v_BKTE, mask_B11T)
    return out_BKgE.reshape(B, 1, H, E)
