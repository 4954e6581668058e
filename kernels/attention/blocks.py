"""Causal attention of one rank of n that share a sequence, in a program without the rank's number.

The sequence has 2n chunks of h tokens, and rank r holds chunks r (low) and 2n - 1 - r (high).  Keys
and values of all ranks are given in rank order, and turned by r, an integer tensor, so that those
of this rank come first.  Of the 4n pairs of chunks a rank computes 2n + 1, each a block of h x h::

    queries   keys
    low       own low            pairs below the diagonal
    high      own high           pairs below the diagonal
    high      low of any rank    all pairs
    low       low of a rank before this one, or   } all pairs: the tensor ``before``
    high      high of a rank after it             } chooses the inputs of one block

So every rank runs the same operations.  The blocks of a row of queries are merged by the
log-sum-exps of their scores, and backward computes the weights of a block again from the merged
one.  The scores of one block exist at a time.

Sources: Liu et al. 2023, "Ring Attention with Blockwise Transformers"; Dao et al. 2022,
"FlashAttention", section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

HIDDEN = -1e30  # finite: a block may have no key that a query sees


class Rows(NamedTuple):
    """Queries of one chunk with their output, its gradient, and the log-sum-exp of all scores."""

    q: Tensor
    out: Tensor
    dout: Tensor
    lse: Tensor


class Kernel(Protocol):
    """Attention of h queries to h keys: q [B, H, h, E], k and v [B, K, h, E].

    ``causal``: only pairs below the diagonal; ``seen``: bool [B, 1, 1, h, h], None for all pairs.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, seen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The output [B, H, h, E], and the log-sum-exp of scores, float32 [B, H, h, 1]."""
        ...

    def backward(
        self, rows: Rows, k: Tensor, v: Tensor, causal: bool, seen: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v."""
        ...


class Plain:
    """A block by plain operations: products in the stored dtype, softmax in float32."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, seen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        scores = self._scores(q, k, causal, seen)
        lse = scores.logsumexp(-1, keepdim=True)
        weights = (scores - lse).exp().to(q.dtype)
        out: Tensor = (weights.flatten(2, 3) @ v).view(q.shape)
        return out, lse.flatten(1, 2)

    def backward(
        self, rows: Rows, k: Tensor, v: Tensor, causal: bool, seen: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, out, dout, lse = rows
        heads = (k.shape[1], q.shape[1] // k.shape[1])
        weights = (self._scores(q, k, causal, seen) - lse.unflatten(1, heads)).exp()
        dout_stacked = dout.unflatten(1, heads).flatten(2, 3)
        dv = weights.to(q.dtype).flatten(2, 3).mT @ dout_stacked
        dweights = _wide(dout_stacked @ v.mT).view(weights.shape)
        along = (_wide(out) * _wide(dout)).sum(-1, keepdim=True).unflatten(1, heads)
        dscores = (weights * (dweights - along) * q.shape[-1] ** -0.5).to(q.dtype).flatten(2, 3)
        dk = dscores.mT @ q.unflatten(1, heads).flatten(2, 3)
        return (dscores @ k).view(q.shape), dk, dv

    def _scores(self, q: Tensor, k: Tensor, causal: bool, seen: Tensor | None) -> Tensor:
        """Scaled products in float32, ``HIDDEN`` where they are not seen: [B, K, H / K, h, h]."""
        heads = (k.shape[1], q.shape[1] // k.shape[1])
        products = q.unflatten(1, heads).flatten(2, 3) @ k.mT
        scores = _wide(products).unflatten(2, (heads[1], -1)) * q.shape[-1] ** -0.5
        if causal:
            place = torch.arange(q.shape[2], dtype=torch.int32, device=q.device)
            below = place[:, None] >= place
            seen = below if seen is None else seen & below
        return scores if seen is None else torch.where(seen, scores, _full(HIDDEN, scores))


PLAIN = Plain()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    rank: Tensor,
    kernel: Kernel = PLAIN,
) -> Tensor:
    """[B, 2h, H, E], 2 x [B, 2nh, K, E], [B, 2nh] or None, integer [1] -> [B, 2h, H, E].

    The queries are those of rank ``rank``; keys, values and documents those of all ranks, in rank
    order.  ``kernel`` computes a block.
    """
    out: Tensor = _Blocks.apply(q, k, v, documents, rank, kernel)  # type: ignore[no-untyped-call]
    return out


class _Pair(NamedTuple):
    """A chunk of queries and one of keys, 0 for low and 1 for high, of the rank ``place`` further.

    ``half`` None: low and low where that rank comes before this one, else high and high.
    """

    place: int
    half: tuple[int, int] | None
    causal: bool = False


def _pairs(n: int) -> Iterator[_Pair]:
    """The blocks of one of ``n`` ranks: every row of queries begins with a block it can see."""
    yield _Pair(0, (0, 0), causal=True)
    yield _Pair(0, (1, 1), causal=True)
    yield _Pair(0, (1, 0))
    for place in range(1, n):
        yield _Pair(place, (1, 0))
        yield _Pair(place, None)


class _Ring:
    """The chunks of keys, values and documents from those of ``rank`` on."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, rank: Tensor
    ) -> None:
        self.n = k.shape[1] // q.shape[1]
        turn = _turned(self.n, rank)
        shape = (self.n, 2, q.shape[1] // 2)
        self.before = turn < rank  # bool [n]: whether the rank at this place comes before this one
        self.keys, self.values = (
            x.unflatten(1, shape).index_select(1, turn).transpose(3, 4) for x in (k, v)
        )  # [B, n, 2, K, h, E]
        self.documents = None
        if documents is not None:
            self.documents = documents.unflatten(1, shape).index_select(1, turn)  # [B, n, 2, h]

    def keys_of(self, pair: _Pair) -> tuple[Tensor, Tensor, bool, Tensor | None]:
        """Keys, values, ``causal`` and ``seen`` of a block."""
        k, v = (self.choose(pair, 1, x[:, pair.place].unbind(1)) for x in (self.keys, self.values))
        seen = None
        if self.documents is not None:
            rows = self.choose(pair, 0, self.documents[:, 0].unbind(1))
            columns = self.choose(pair, 1, self.documents[:, pair.place].unbind(1))
            seen = rows[:, None, None, :, None] == columns[:, None, None, None, :]
        return k, v, pair.causal, seen

    def choose(self, pair: _Pair, side: int, halves: Sequence[Tensor]) -> Tensor:
        """Of (low, high), the one that a block reads as queries (``side`` 0) or keys (1)."""
        if pair.half is not None:
            return halves[pair.half[side]]
        low, high = halves
        return torch.where(self.before[pair.place], low, high)

    def parts(
        self, pair: _Pair, side: int, x: Tensor, other: float
    ) -> Iterator[tuple[int, Tensor]]:
        """The transpose of ``choose``: (half, x), with ``other`` for x where it is not chosen."""
        if pair.half is not None:
            yield pair.half[side], x
            return
        before, nothing = self.before[pair.place], _full(other, x)
        yield 0, torch.where(before, x, nothing)
        yield 1, torch.where(before, nothing, x)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Tensor | None,
        rank: Tensor,
        kernel: Kernel,
    ) -> Tensor:
        ring, halves = _Ring(q, k, v, documents, rank), _halves(q)
        merged: dict[int, tuple[Tensor, Tensor]] = {}
        for pair in _pairs(ring.n):
            out, lse = kernel.forward(ring.choose(pair, 0, halves), *ring.keys_of(pair))
            for half, part in ring.parts(pair, 0, lse, HIDDEN):
                new = (_wide(out), part)
                merged[half] = _merge(merged[half], new) if half in merged else new
        outs, lses = ([merged[half][i] for half in (0, 1)] for i in (0, 1))
        whole = torch.cat(outs, 2).to(q.dtype).transpose(1, 2)
        ctx.save_for_backward(q, k, v, documents, rank, whole, *lses)
        ctx.kernel = kernel
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, documents, rank, out, *lses = ctx.saved_tensors
        ring = _Ring(q, k, v, documents, rank)
        rows = [_halves(x) for x in (q, out, dout)] + [tuple(lses)]
        dq: dict[int, Tensor] = {}
        dkv: list[dict[tuple[int, int], Tensor]] = [{}, {}]  # by place and half
        for pair in _pairs(ring.n):
            chosen = Rows(*(ring.choose(pair, 0, halves) for halves in rows))
            dq_block, *dkv_block = ctx.kernel.backward(chosen, *ring.keys_of(pair))
            for half, part in ring.parts(pair, 0, _wide(dq_block), 0.0):
                dq[half] = dq[half] + part if half in dq else part
            for total, block in zip(dkv, dkv_block, strict=True):
                for half, part in ring.parts(pair, 1, _wide(block), 0.0):
                    key = pair.place, half
                    total[key] = total[key] + part if key in total else part

        back, gradients = _turned(ring.n, -rank), []
        for total in dkv:
            parts = [total[place, half] for place in range(ring.n) for half in (0, 1)]
            turned = torch.stack(parts, 1).unflatten(1, (ring.n, 2)).index_select(1, back)
            gradients.append(turned.transpose(3, 4).flatten(1, 3).to(k.dtype))
        dq_whole = torch.cat((dq[0], dq[1]), 2).transpose(1, 2).to(q.dtype)
        return dq_whole, *gradients, None, None, None


def _halves(x: Tensor) -> Sequence[Tensor]:
    """The low and the high chunk: [B, 2h, H, E] -> 2 x [B, H, h, E]."""
    return x.transpose(1, 2).chunk(2, 2)


def _merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of two disjoint sets of keys together."""
    largest = torch.maximum(a[1], b[1])
    lse = largest + ((a[1] - largest).exp() + (b[1] - largest).exp()).log()
    return a[0] * (a[1] - lse).exp() + b[0] * (b[1] - lse).exp(), lse


def _turned(n: int, by: Tensor) -> Tensor:
    """0, 1, .. n - 1 from ``by`` on, around: integer [1] -> int32 [n]."""
    place = torch.arange(n, dtype=torch.int32, device=by.device)
    return torch.remainder(place + by + n, n)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _full(value: float, like: Tensor) -> Tensor:
    """A 0-d tensor: torch-xla would make a Python number 64 bits wide."""
    return torch.full((), value, dtype=like.dtype, device=like.device)
