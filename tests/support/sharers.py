"""Ranks that share sequences, for attention by blocks: alone, or as threads of a ring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Rank(NamedTuple):
    """One of ``size`` ranks that share sequences; ``desks`` has what each of a ring sends."""

    rank: int
    size: int
    desks: list[Tensor] = []
    meeting: Barrier | None = None

    @property
    def rank_index(self) -> Tensor:
        return torch.tensor([self.rank], dtype=torch.int32)

    def start_shift(self, x: Tensor, by: int = 1) -> Callable[[], Tensor]:
        assert self.meeting is not None, "keys and values were gathered"
        self.desks[self.rank] = x
        self.meeting.wait(300)
        arrived = self.desks[(self.rank - by) % self.size].clone()
        self.meeting.wait(300)
        return lambda: arrived


def around(size: int, function: Callable[[Rank], T]) -> Sequence[T]:
    """``function`` of every rank of a ring, each in a thread."""
    desks, meeting = [torch.empty(0)] * size, Barrier(size)
    with ThreadPoolExecutor(size) as threads:
        return [*threads.map(function, (Rank(r, size, desks, meeting) for r in range(size)))]


def all_ranks(k: Tensor, v: Tensor, order: Tensor) -> Tensor:
    """Keys and values in ``order``, as heads of one tensor."""
    return torch.cat((k, v), 2)[:, order]
