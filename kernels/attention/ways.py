"""The two ways of keys and values to a rank that shares sequences: gathered, or around a ring.

Place t has the keys and values of rank r + t, around, and place 0 its own.  Gathered ones are all
there.  Around a ring, every rank sends the same way at the same time: what it holds in forward goes
to the rank before it, in backward to the rank after it, and the gradient of what it holds goes
along, in float32, until it is at home::

    n = 3       forward: keys of ranks       backward: keys of ranks    and their gradients
    rank 0         0 -> 1 -> 2                  0 -> 2 -> 1                 2 -> 1 -> 0
    rank 1         1 -> 2 -> 0                  1 -> 0 -> 2                 0 -> 2 -> 1
    rank 2         2 -> 0 -> 1                  2 -> 1 -> 0                 1 -> 0 -> 2

A rank then holds two shares at a time, that in use and that on its way, instead of n.  Both travel
while the block of the share in use is computed: a transfer begins before it and is waited for after
it, in the same order on every rank.  Because backward goes the other way around, a compiler cannot
keep what arrived in forward in its place.

Source: Liu et al. 2023, "Ring Attention with Blockwise Transformers", section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

Gradients = Callable[[int, Tensor], Tensor]  # (place, its keys and values) -> their gradient


class Ranks(Protocol):
    """The ranks that share sequences: an axis of ``llamax.parallel.collectives``."""

    size: int
    rank_index: Tensor

    def start_shift(self, x: Tensor, by: int = 1) -> Callable[[], Tensor]:
        """Begin to fetch the tensor of rank ``rank - by``, around the ring: [...] -> [...]."""
        ...


class Way(Protocol):
    """How keys and values, [B, m, 2K, E], come to a rank, and their gradients back."""

    def forward(self, kv: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Every place and its keys and values, [B, 2h, 2K, E]; place 0 comes first."""
        ...

    def backward(self, kv: Tensor, gradients: Gradients) -> Tensor:
        """The gradient of ``kv``, from those of every place."""
        ...


class Gathered:
    """Keys and values of all ranks, in rank order: turned, so that those of this rank come first.

    Their gradients are those of all ranks, which the transpose of the gather sums.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.size, self.rank = ranks.size, ranks.rank_index

    def forward(self, kv: Tensor) -> Iterator[tuple[int, Tensor]]:
        shares = kv.unflatten(1, (self.size, -1)).index_select(1, turned(self.size, self.rank))
        return enumerate(shares.unbind(1))

    def backward(self, kv: Tensor, gradients: Gradients) -> Tensor:
        turn = turned(self.size, -self.rank)
        shares = [gradients(place, keys) for place, keys in self.forward(kv)]
        return torch.stack(shares, 1).index_select(1, turn).flatten(1, 2)


class Ring:
    """Keys and values of this rank, passed around."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def forward(self, kv: Tensor) -> Iterator[tuple[int, Tensor]]:
        return self._passed(kv, -1)

    def backward(self, kv: Tensor, gradients: Gradients) -> Tensor:
        places = self._passed(kv, 1)
        own, passing = gradients(*next(places)), gradients(*next(places))
        for place, keys in places:
            arrived = self.ranks.start_shift(passing, 1)
            found = gradients(place, keys)
            passing = arrived() + found
        return own + self.ranks.start_shift(passing, 1)()

    def _passed(self, kv: Tensor, by: int) -> Iterator[tuple[int, Tensor]]:
        """Places and their keys and values, sent on to the rank ``by`` further."""
        size = self.ranks.size
        for step in range(size - 1):
            arrived = self.ranks.start_shift(kv, by)
            yield -by * step % size, kv
            kv = arrived()
        yield by % size, kv


def way(q: Tensor, kv: Tensor, ranks: Ranks) -> Way:
    """Gathered where ``kv`` has the tokens of all ranks; a ring where it has those of ``q``."""
    return Ring(ranks) if kv.shape[1] == q.shape[1] and ranks.size > 1 else Gathered(ranks)


def turned(n: int, by: Tensor) -> Tensor:
    """0, 1, .. n - 1 from ``by`` on, around: integer [1] -> int32 [n]."""
    place = torch.arange(n, dtype=torch.int32, device=by.device)
    return torch.remainder(place + by + n, n)
