"""Counts what an axis sends.

Bytes are those one rank sends over links when rings are used (Thakur et al. 2005, section 3):
all-gather and reduce-scatter move (p-1)/p of the whole, all-reduce twice that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from llamax.parallel.collectives import Axis, Reduction


@dataclass
class Meter:
    """Calls and bytes sent by this rank, by (axis, verb)."""

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    sent_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, axis: Axis, verb: str, whole_bytes: float) -> None:
        if axis.size > 1:
            self.calls[axis.name, verb] += 1
            self.sent_bytes[axis.name, verb] += round(whole_bytes * (axis.size - 1) / axis.size)

    def clear(self) -> None:
        self.calls.clear()
        self.sent_bytes.clear()


class Metered(Axis):
    """An axis that counts what it sends, then passes the call on."""

    def __init__(self, axis: Axis, meter: Meter) -> None:
        self.axis, self.meter = axis, meter
        self.name, self.size, self.rank = axis.name, axis.size, axis.rank
        self.rank_index = axis.rank_index

    def all_reduce(self, x: Tensor, op: Reduction = "sum") -> Tensor:
        self.meter.add(self, "all_reduce", 2 * x.nbytes)
        return self.axis.all_reduce(x, op)

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        self.meter.add(self, "all_gather", self.size * x.nbytes)
        return self.axis.all_gather(x, dim)

    def start_all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        self.meter.add(self, "all_gather", self.size * x.nbytes)
        return self.axis.start_all_gather(x)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        self.meter.add(self, "reduce_scatter", x.nbytes)
        return self.axis.reduce_scatter(x, dim)

    def start_reduce_scatter(self, x: Tensor) -> Callable[[], Tensor]:
        self.meter.add(self, "reduce_scatter", x.nbytes)
        return self.axis.start_reduce_scatter(x)

    def all_to_all(self, x: Tensor, split: int, concat: int) -> Tensor:
        self.meter.add(self, "all_to_all", x.nbytes)
        return self.axis.all_to_all(x, split, concat)

    def start_shift(self, x: Tensor, by: int = 1) -> Callable[[], Tensor]:
        self.meter.add(self, "shift", x.nbytes * self.size / max(self.size - 1, 1))
        return self.axis.start_shift(x, by)
