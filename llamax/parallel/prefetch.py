"""Gathers the weight that is used next while the current one is used (FSDP's prefetch).

::

    used        W0        W1        W2        ...   W2        W1        W0
    gathered    W0   W1   |    W2   |    W3   ...   |    W1   |    W0   |
                     └─ while W0 is multiplied, W1 is under way

Layers use their weights in the same order in every step, forward and backward.  ``Prefetch`` notes
the order of a pass of a kind (a training step, a batch of validation), and follows it in the next
one.  Where a pass departs from it, a gather is in vain and nothing else is different.  At most one
weight more is whole than without it.  All ranks use weights in the same order, so that they begin
the same gathers in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor


class Gathered(Protocol):
    """A tensor that is sharded over ranks."""

    @property
    def local(self) -> Tensor:
        """The shard that this rank keeps, with padding."""
        ...

    def gather(self) -> Tensor:
        """All shards, joined."""
        ...

    def start_gather(self) -> Callable[[], Tensor]:
        """Begin ``gather``; the function returned waits for it."""
        ...


class _Started(NamedTuple):
    """A gather under way, of ``store`` as it was after ``version`` writes."""

    store: Gathered
    version: int
    wait: Callable[[], Tensor]


class Prefetch:
    """Gathers of one rank, one weight ahead of their use.

    ``hits`` counts the gathers that were under way when they were needed.
    """

    def __init__(self) -> None:
        self.hits = 0
        self._kind = ""
        self._orders: dict[str, list[Gathered]] = {}
        self._order: list[Gathered] = []
        self._used: list[Gathered] = []
        self._started: _Started | None = None

    def begin(self, kind: str) -> None:
        """Begin a pass of a kind: passes of one kind use the same weights in the same order."""
        if self._kind:
            self._orders[self._kind] = self._used
        self._kind, self._used, self._order = kind, [], self._orders.get(kind, [])

    def gather(self, store: Gathered) -> Tensor:
        """The whole of ``store``; begins to gather what comes after it."""
        whole = self._arrived(store)
        if self._kind:
            place = len(self._used)
            self._used.append(store)
            expected = self._order[place : place + 2]
            if len(expected) == 2 and expected[0] is store:
                coming = expected[1]
                version = coming.local._version
                self._started = _Started(coming, version, coming.start_gather())
        return whole

    def _arrived(self, store: Gathered) -> Tensor:
        started, self._started = self._started, None
        if started is not None:
            whole = started.wait()  # also where it is in vain: no collective is left open
            if started.store is store and started.version == store.local._version:
                self.hits += 1
                return whole
        return store.gather()
