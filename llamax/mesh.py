"""Rank <-> (pp, dp, cp, tp), and the replica groups of every axis: integers, nothing else.

One grid of shape [pp, dp, cp, tp] in row-major order explains every group: tensor-parallel ranks
are neighbours (they talk most and share a node), pipeline stages are far apart.  With dp 2, tp 4::

    dp 0:  0 1 2 3        groups("tp") = (0 1 2 3) (4 5 6 7)
    dp 1:  4 5 6 7        groups("dp") = (0 4) (1 5) (2 6) (3 7)

Every call returns *all* groups of an axis, because XLA wants them all, not only mine.
The order is that of neuronx-distributed's ``parallel_state``, so both can share one process.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from llamax.errors import ConfigError

AXES = ("pp", "dp", "cp", "tp")

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Coordinate:
    """Where one global rank sits: its rank in each axis."""

    pp: int
    dp: int
    cp: int
    tp: int

    def __str__(self) -> str:
        return f"pp{self.pp} dp{self.dp} cp{self.cp} tp{self.tp}"


@dataclass(frozen=True)
class Mesh:
    """The degree of every axis."""

    tp: int = 1
    dp: int = 1
    cp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if self.degree(axis) < 1:
                raise ConfigError(
                    f"mesh degree {axis}={self.degree(axis)} is below 1; use 1 or more"
                )

    @classmethod
    def fill(cls, world_size: int, tp: int = 1, cp: int = 1, pp: int = 1) -> Mesh:
        """The mesh of ``world_size`` ranks whose data axis takes what the other axes leave."""
        rest, over = divmod(world_size, tp * cp * pp)
        if over or not rest:
            raise ConfigError(
                f"a world of {world_size} ranks is not divided by tensor {tp} x context {cp} x "
                f"pipeline {pp} = {tp * cp * pp}; start a multiple of {tp * cp * pp} ranks"
            )
        return cls(tp=tp, dp=rest, cp=cp, pp=pp)

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    def degree(self, axis: str) -> int:
        """The number of ranks along ``axis`` (pp, dp, cp or tp)."""
        return {"pp": self.pp, "dp": self.dp, "cp": self.cp, "tp": self.tp}[axis]

    def coordinate(self, rank: int) -> Coordinate:
        """The place of global ``rank``; ValueError outside the world."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside a world of {self.world_size}")
        rank, tp = divmod(rank, self.tp)
        rank, cp = divmod(rank, self.cp)
        pp, dp = divmod(rank, self.dp)
        return Coordinate(pp=pp, dp=dp, cp=cp, tp=tp)

    def rank(self, at: Coordinate) -> int:
        """The global rank at a coordinate: the inverse of ``coordinate``."""
        return ((at.pp * self.dp + at.dp) * self.cp + at.cp) * self.tp + at.tp

    def groups(self, *axes: str) -> Groups:
        """All groups of ranks that differ only along ``axes``, in rank order.

        Several axes make one larger axis: ``groups("dp", "cp")`` is where gradients are summed.
        """
        fixed = [axis for axis in AXES if axis not in axes]
        if len(fixed) != len(AXES) - len(set(axes)):
            raise ValueError(f"axes {axes} are not among {AXES}")
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            at = self.coordinate(rank)
            found.setdefault(tuple(getattr(at, axis) for axis in fixed), []).append(rank)
        return tuple(tuple(ranks) for ranks in found.values())

    def replicas(self, axis: str, size: int) -> Groups:
        """The groups of ``axis`` broken into runs of ``size`` neighbours.

        With more tensor ranks than key/value heads, ``size = tp / heads`` neighbours hold one head.
        """
        if self.degree(axis) % size:
            raise ValueError(f"runs of {size} do not tile {axis}={self.degree(axis)}")
        return tuple(
            group[i : i + size]
            for group, i in itertools.product(self.groups(axis), range(0, self.degree(axis), size))
        )
