"""Causal attention of one rank of n that share a sequence, in a program without the rank's number.

The sequence has 2n chunks of h tokens, and rank r holds chunks r (low) and 2n - 1 - r (high).  Keys
and values come by place: place t has those of rank r + t, around.  Of the 4n pairs of chunks a rank
computes 2n + 1, each a block of h x h::

    queries   keys
    low       own low            pairs below the diagonal
    high      own high           pairs below the diagonal
    high      low of any rank    all pairs
    low       low of a rank before this one, or   } all pairs: the tensor ``before``
    high      high of a rank after it             } chooses the inputs of one block

So every rank runs the same operations.  The blocks of a row of queries are merged by the
log-sum-exps of their scores, and backward computes the weights of a block again from the merged
one.  The scores of one block exist at a time.  ``ways.py`` has the two ways of keys and values to a
rank: all gathered before, or passed around a ring.

Sources: Liu et al. 2023, "Ring Attention with Blockwise Transformers"; Dao et al. 2022,
"FlashAttention", section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamax.config.constants import ATTENTION_BLOCK_QUERIES
from llamax.config.hidden import HIDDEN
from llamax.kernels.attention.ways import Ranks, turned, way


class Rows(NamedTuple):
    """Queries of one chunk with their output, its gradient, and the log-sum-exp of all scores."""

    q: Tensor
    out: Tensor
    dout: Tensor
    lse: Tensor


Numbers = tuple[Tensor, Tensor]  # of the documents of queries and of keys: 2 x [B, tokens]


class Kernel(Protocol):
    """Attention of m queries to the keys of a block: q [B, H, m, E], k and v [B, K, h, E].

    ``causal``: only pairs below the diagonal, on which the last query meets the last key.
    ``numbers``: only pairs of the same document; None for all.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, numbers: Numbers | None
    ) -> tuple[Tensor, Tensor]:
        """The output [B, H, m, E], and the log-sum-exp of scores, float32 [B, H, m, 1]."""
        ...

    def backward(
        self, rows: Rows, k: Tensor, v: Tensor, causal: bool, numbers: Numbers | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v."""
        ...


class Plain:
    """A block by plain operations: products in the stored dtype, softmax in float32."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, numbers: Numbers | None
    ) -> tuple[Tensor, Tensor]:
        scores = self._scores(q, k, causal, numbers)
        lse = scores.logsumexp(-1, keepdim=True)
        weights = scores.sub_(lse).exp_().to(q.dtype)
        out: Tensor = (weights.flatten(2, 3) @ v).view(q.shape)
        return out, lse.flatten(1, 2)

    def backward(
        self, rows: Rows, k: Tensor, v: Tensor, causal: bool, numbers: Numbers | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, out, dout, lse = rows
        heads = (k.shape[1], q.shape[1] // k.shape[1])
        weights = self._scores(q, k, causal, numbers).sub_(lse.unflatten(1, heads)).exp_()
        dout_stacked = dout.unflatten(1, heads).flatten(2, 3)
        dv = weights.to(q.dtype).flatten(2, 3).mT @ dout_stacked
        dweights = _wide(dout_stacked @ v.mT).view(weights.shape)
        along = (_wide(out) * _wide(dout)).sum(-1, keepdim=True).unflatten(1, heads)
        dscores = dweights.sub_(along).mul_(weights).mul_(q.shape[-1] ** -0.5)
        dscores = dscores.to(q.dtype).flatten(2, 3)
        dk = dscores.mT @ q.unflatten(1, heads).flatten(2, 3)
        return (dscores @ k).view(q.shape), dk, dv

    def _scores(self, q: Tensor, k: Tensor, causal: bool, numbers: Numbers | None) -> Tensor:
        """Scaled products in float32, ``HIDDEN`` where they are not seen: [B, K, H / K, m, h]."""
        heads = (k.shape[1], q.shape[1] // k.shape[1])
        products = q.unflatten(1, heads).flatten(2, 3) @ k.mT
        scores = _wide(products).mul_(q.shape[-1] ** -0.5).unflatten(2, (heads[1], -1))
        seen = None
        if causal:
            place = torch.arange(k.shape[2], dtype=torch.int32, device=q.device)
            seen = place[-q.shape[2] :, None] >= place
        if numbers is not None:
            same = numbers[0][:, None, None, :, None] == numbers[1][:, None, None, None, :]
            seen = same if seen is None else same & seen
        return scores if seen is None else torch.where(seen, scores, _full(HIDDEN, scores))


PLAIN = Plain()


class Runs:
    """A block by a run of queries at a time, so that fewer scores exist: for eager devices.

    On a CPU in float32, as all its attention.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, numbers: Numbers | None
    ) -> tuple[Tensor, Tensor]:
        k, v = _computed(k), _computed(v)
        parts = [
            PLAIN.forward(_computed(q[:, :, run]), k[:, :, keys], v[:, :, keys], causal, some)
            for run, keys, some in self._runs(q, causal, numbers)
        ]
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, 2), torch.cat(lses, 2)

    def backward(
        self, rows: Rows, k: Tensor, v: Tensor, causal: bool, numbers: Numbers | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        dk, dv = (torch.zeros_like(x, dtype=rows.lse.dtype) for x in (k, v))
        k, v, dq = _computed(k), _computed(v), list[Tensor]()
        for run, keys, some in self._runs(rows.q, causal, numbers):
            part = Rows(*(_computed(x[:, :, run]) for x in rows))
            found = PLAIN.backward(part, k[:, :, keys], v[:, :, keys], causal, some)
            dq.append(found[0])
            dk[:, :, keys] += found[1]
            dv[:, :, keys] += found[2]
        return torch.cat(dq, 2), dk, dv

    @staticmethod
    def _runs(
        q: Tensor, causal: bool, numbers: Numbers | None
    ) -> Iterator[tuple[slice, slice, Numbers | None]]:
        """Queries, the keys that they may see, and the document numbers of both."""
        for start in range(0, q.shape[2], ATTENTION_BLOCK_QUERIES):
            stop = min(start + ATTENTION_BLOCK_QUERIES, q.shape[2])
            run, keys = slice(start, stop), slice(stop if causal else None)
            some = None if numbers is None else (numbers[0][:, run], numbers[1][:, keys])
            yield run, keys, some


def attention(
    q: Tensor, kv: Tensor, documents: Tensor | None, ranks: Ranks, kernel: Kernel = PLAIN
) -> Tensor:
    """[B, 2h, H, E], [B, 2nh or 2h, 2K, E], [B, 2nh] or None -> [B, 2h, H, E].

    The queries are those of this rank of ``ranks``, documents those of all, in rank order.  ``kv``
    has K heads of keys, then K of values: of all ranks, in rank order, or of this rank alone, where
    they are passed around a ring.  ``kernel`` computes a block.
    """
    out: Tensor = _Blocks.apply(q, kv, documents, ranks, kernel)  # type: ignore[no-untyped-call]
    return out


def attention_by_runs(q: Tensor, kv: Tensor, documents: Tensor | None, ranks: Ranks) -> Tensor:
    """``attention`` on a device that runs operations one by one."""
    return attention(q, kv, documents, ranks, Runs())


class _Pair(NamedTuple):
    """A chunk of queries and one of keys, 0 for low and 1 for high, of the rank ``place`` further.

    ``half`` None: low and low where that rank comes before this one, else high and high.
    """

    place: int
    half: tuple[int, int] | None
    causal: bool = False


def _pairs(place: int) -> Iterator[_Pair]:
    """The blocks with the keys of a place; place 0 comes first, where every query sees its own."""
    if place == 0:
        yield _Pair(0, (0, 0), causal=True)
        yield _Pair(0, (1, 1), causal=True)
    yield _Pair(place, (1, 0))
    if place > 0:
        yield _Pair(place, None)


class _Choice:
    """Chooses the chunks of a block by tensors: the rank's number is data."""

    def __init__(self, q: Tensor, documents: Tensor | None, ranks: Ranks) -> None:
        turn = turned(ranks.size, ranks.rank_index)
        # bool [n]: whether the rank at this place comes before this one
        self.before = turn < ranks.rank_index
        self.documents = None
        if documents is not None:
            shape = (ranks.size, 2, q.shape[1] // 2)
            self.documents = documents.unflatten(1, shape).index_select(1, turn)  # [B, n, 2, h]

    def keys_of(self, pair: _Pair, kv: Tensor) -> tuple[Tensor, Tensor, bool, Numbers | None]:
        """Keys, values, ``causal`` and ``numbers`` of a block, from [B, 2h, 2K, E]."""
        k, v = self.choose(pair, 1, _halves(kv)).chunk(2, 1)
        numbers = None
        if self.documents is not None:
            rows = self.choose(pair, 0, self.documents[:, 0].unbind(1))
            columns = self.choose(pair, 1, self.documents[:, pair.place].unbind(1))
            numbers = rows, columns
        return k, v, pair.causal, numbers

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
        ctx: Any, q: Tensor, kv: Tensor, documents: Tensor | None, ranks: Ranks, kernel: Kernel
    ) -> Tensor:
        choice, halves = _Choice(q, documents, ranks), _halves(q)
        merged: dict[int, tuple[Tensor, Tensor]] = {}
        for place, keys in way(q, kv, ranks).forward(kv):
            for pair in _pairs(place):
                out, lse = kernel.forward(
                    choice.choose(pair, 0, halves), *choice.keys_of(pair, keys)
                )
                for half, part in choice.parts(pair, 0, lse, HIDDEN):
                    new = (_wide(out), part)
                    merged[half] = _merge(merged[half], new) if half in merged else new
        outs, lses = ([merged[half][i] for half in (0, 1)] for i in (0, 1))
        whole = torch.cat([out.transpose(1, 2) for out in outs], 1).to(q.dtype)
        ctx.save_for_backward(q, kv, documents, whole, *lses)
        ctx.ranks, ctx.kernel = ranks, kernel
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, documents, out, *lses = ctx.saved_tensors
        choice, dq = _Choice(q, documents, ctx.ranks), dict[int, Tensor]()
        rows = [_halves(x) for x in (q, out, dout)] + [tuple(lses)]

        def gradients(place: int, keys: Tensor) -> Tensor:
            """The gradient of the keys and values of a place, float32 [B, 2h, 2K, E]."""
            dkv = dict[int, Tensor]()
            for pair in _pairs(place):
                chosen = Rows(*(choice.choose(pair, 0, halves) for halves in rows))
                dq_block, *dkv_block = ctx.kernel.backward(chosen, *choice.keys_of(pair, keys))
                for half, part in choice.parts(pair, 0, _wide(dq_block), 0.0):
                    dq[half] = dq[half] + part if half in dq else part
                block = torch.cat([_wide(x) for x in dkv_block], 1)
                for half, part in choice.parts(pair, 1, block, 0.0):
                    dkv[half] = dkv[half] + part if half in dkv else part
            return torch.cat((dkv[0], dkv[1]), 2).transpose(1, 2)

        dkv_whole = way(q, kv, ctx.ranks).backward(kv, gradients)
        dq_whole = torch.cat((dq[0], dq[1]), 2).transpose(1, 2)
        return dq_whole.to(q.dtype), dkv_whole.to(kv.dtype), None, None, None


def _halves(x: Tensor) -> Sequence[Tensor]:
    """The low and the high chunk: [B, 2h, H, E] -> 2 x [B, H, h, E]."""
    return x.transpose(1, 2).chunk(2, 2)


def _merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of two disjoint sets of keys together."""
    largest = torch.maximum(a[1], b[1])
    lse = largest + ((a[1] - largest).exp() + (b[1] - largest).exp()).log()
    return a[0] * (a[1] - lse).exp() + b[0] * (b[1] - lse).exp(), lse


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _computed(x: Tensor) -> Tensor:
    """x in the dtype of products."""
    return _wide(x) if x.device.type == "cpu" else x


def _full(value: float, like: Tensor) -> Tensor:
    """A 0-d tensor: torch-xla would make a Python number 64 bits wide."""
    return torch.full((), value, dtype=like.dtype, device=like.device)
