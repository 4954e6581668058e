"""Attention of queries at the end of their keys, and of ranks that share a sequence, by blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.sharers import Rank, all_ranks, around
from torch import Tensor

from llamax import ops
from llamax.kernels.attention import blocks, op, reference
from llamax.parallel import context_parallel

BATCH, HEADS, KV, WIDTH = 2, 4, 2, 6


def draw(length: int, heads: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(BATCH, length, heads, WIDTH, dtype=dtype, requires_grad=True)


def numbers(length: int, apart: bool) -> Tensor | None:
    """Document numbers in which one comes back later."""
    if not apart:
        return None
    return torch.stack([torch.arange(length) * 5 // length % 3, torch.arange(length) % 2]).int()


def exact(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, documents: Tensor | None) -> list[Tensor]:
    """Output and gradients of q, k and v by the reference in float64."""
    arrays = [x.detach().double().numpy() for x in (q, k, v)]
    known = None if documents is None else documents.numpy()
    grads = reference.attention_backward(dout.double().numpy(), *arrays, known)
    return [torch.from_numpy(x) for x in (reference.attention(*arrays, known), *grads)]


def agree(found: list[Any], expected: list[Tensor], tolerance: float = 1e-13) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.double() - theirs).abs().max() <= tolerance * theirs.abs().max()


WAYS = (op.attention, ops.reference_attention, ops.traced_attention, ops.fused_attention)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("length", "keys"), [(1, 7), (3, 9), (130, 301), (256, 256)])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_queries_are_the_last_of_the_tokens(
    way: Callable[..., Tensor], length: int, keys: int, apart: bool
) -> None:
    q, k, v = draw(length, HEADS), draw(keys, KV), draw(keys, KV)
    documents, dout = numbers(keys, apart), torch.randn_like(q)
    out = way(q, k, v, documents)
    out.backward(dout)
    agree([out, q.grad, k.grad, v.grad], exact(q, k, v, dout, documents))


KERNELS = {"whole": blocks.PLAIN, "runs": blocks.Runs()}


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_blocks_of_all_ranks_are_the_whole(
    monkeypatch: pytest.MonkeyPatch, ranks: int, kernel: str, apart: bool
) -> None:
    monkeypatch.setattr(blocks, "ATTENTION_BLOCK_QUERIES", 2)
    length = 6 * ranks
    q, k, v = draw(length, HEADS), draw(length, KV), draw(length, KV)
    documents, dout = numbers(length, apart), torch.randn_like(q)
    order = context_parallel.in_rank_order(torch.arange(length)[None], ranks)[0]
    turned = None if documents is None else documents[:, order]
    out = torch.empty_like(q)
    for rank in range(ranks):
        mine = order.chunk(ranks)[rank]
        kv, there = all_ranks(k, v, order), Rank(rank, ranks)
        part = blocks.attention(q[:, mine], kv, turned, there, KERNELS[kernel])
        part.backward(dout[:, mine])
        out[:, mine] = part.detach()
    agree([out, q.grad, k.grad, v.grad], exact(q, k, v, dout, documents))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_keys_and_values_around_a_ring_are_the_whole(
    monkeypatch: pytest.MonkeyPatch, ranks: int, kernel: str, apart: bool
) -> None:
    """Every rank has a share; the gradients of its keys and values come home."""
    monkeypatch.setattr(blocks, "ATTENTION_BLOCK_QUERIES", 2)
    length = 6 * ranks
    q, k, v = draw(length, HEADS), draw(length, KV), draw(length, KV)
    documents, dout = numbers(length, apart), torch.randn_like(q)
    order = context_parallel.in_rank_order(torch.arange(length)[None], ranks)[0]
    turned = None if documents is None else documents[:, order]

    def one(there: Rank) -> list[Tensor]:
        mine = order.chunk(ranks)[there.rank]
        shares = [x[:, mine].detach().requires_grad_() for x in (q, k, v)]
        kv = torch.cat(shares[1:], 2)
        out = blocks.attention(shares[0], kv, turned, there, KERNELS[kernel])
        out.backward(dout[:, mine])
        return [out.detach(), *(x.grad for x in shares if x.grad is not None)]

    wholes = [torch.cat(parts, 1) for parts in zip(*around(ranks, one), strict=True)]
    agree(wholes, [x[:, order] for x in exact(q, k, v, dout, documents)])


def test_bf16_is_merged_in_fp32() -> None:
    length, ranks = 64, 4
    q, k, v = (draw(length, heads, torch.bfloat16) for heads in (HEADS, KV, KV))
    order = context_parallel.in_rank_order(torch.arange(length)[None], ranks)[0]
    mine = order.chunk(ranks)[2]
    part = ops.attention_by_blocks(q[:, mine], all_ranks(k, v, order), None, Rank(2, ranks))
    assert part.dtype == torch.bfloat16
    dout = torch.zeros_like(q)
    dout[:, mine] = torch.randn_like(part)
    part.backward(dout[:, mine])
    whole = exact(q, k, v, dout, None)
    agree([part, q.grad, k.grad, v.grad], [whole[0][:, mine], *whole[1:]], 2e-2)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = ((draw(24, heads) * 300).detach().requires_grad_() for heads in (HEADS, KV, KV))
    order = context_parallel.in_rank_order(torch.arange(24)[None], 2)[0]
    mine = order.chunk(2)[1]
    kv, documents = all_ranks(k, v, order), numbers(24, True)
    out = ops.attention_by_blocks(q[:, mine], kv, documents, Rank(1, 2))
    out.sum().backward()
    for x in (out, q.grad, k.grad, v.grad):
        assert x is not None
        assert x.isfinite().all()


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_rank_computes_2n_plus_1_of_4n_blocks(ranks: int) -> None:
    pairs = [pair for place in range(ranks) for pair in blocks._pairs(place)]
    assert len(pairs) == 2 * ranks + 1
    for rank in range(ranks):
        low, high = context_parallel.chunks_of(rank, ranks)
        seen = set()
        for pair in pairs:
            other = (rank + pair.place) % ranks
            row, column = pair.half or ((0, 0) if other < rank else (1, 1))
            theirs = context_parallel.chunks_of(other, ranks)[column]
            mine = (low, high)[row]
            assert (mine == theirs) == pair.causal
            seen.add((mine, theirs))
        assert seen == {(mine, k) for mine in (low, high) for k in range(mine + 1)}


class Counted(blocks.Plain):
    """Counts blocks and remembers the largest."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    def forward(self, q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        self.sizes.append((q.shape[2], k.shape[2]))
        return super().forward(q, k, *rest)


def test_only_chunks_meet() -> None:
    kernel = Counted()
    q, kv = draw(8, HEADS), draw(32, 2 * KV)
    blocks.attention(q, kv, None, Rank(3, 4), kernel)
    assert kernel.sizes == [(4, 4)] * 9
    assert np.prod(kernel.sizes, 1).sum() == 9 / 16 * q.shape[1] * kv.shape[1]
