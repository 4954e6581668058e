"""Rank <-> (pp, dp, cp, tp), and the replica groups of every axis: integers, nothing else.

One grid of shape [pp, dp, cp, tp] in row-major order explains every group: tensor-parallel ranks
are neighbours (they talk most and share a node), pipeline stages are far apart.  With dp 2, tp 4::

    dp 0:  0 1 2 3        groups("tp") = (0 1 2 3) (4 5 6 7)
    dp 1:  4 5 6 7        groups("dp") = (0 4) (1 5) (2 6) (3 7)

Data and context ranks share what ZeRO cuts: all of them, or ``shard`` neighbours, a group in a node
say, while other groups hold the same again.  With dp 4, shard 2::

    dp 0 1 | 2 3          shard = (0 1) (2 3)           replica = (0 2) (1 3)

Every call returns *all* groups of an axis, because XLA needs those of every rank.  The order is
that of neuronx-distributed's ``parallel_state``, so both can share one process.

``order`` lists the rank at every place of the grid, where that is not 0, 1, 2, ...  On a
trn1.32xlarge the cores r, r + 8, r + 16, r + 24 are linked to each other, and with tp 4 they are
one tensor group: ``Mesh.on_trn1``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from llamax.runtime.errors import ConfigError
from llamax.runtime.units import count

AXES = ("pp", "dp", "cp", "tp")
EDGES = ("even", "odd", "ends")  # between stages s and s + 1, by the parity of s; last and first

Groups = tuple[tuple[int, ...], ...]


class Seat(NamedTuple):
    """The number of a rank among ``size`` ranks of an axis."""

    rank: int
    size: int


ALONE = Seat(0, 1)


@dataclass(frozen=True)
class Coordinate:
    """Where one global rank sits: its rank in each axis."""

    pp: int
    dp: int
    cp: int
    tp: int


@dataclass(frozen=True)
class Mesh:
    """The degree of every axis.

    ``order`` is the rank on every place of the grid, () for 0, 1, ...  ``kv`` tensor neighbours
    hold the same key/value head: ``ModelConfig.kv_replicas``.  ``ends``: whether the last stage
    and the first one meet as well.  ``shard`` data and context neighbours share what ZeRO cuts; 0:
    all of them.
    """

    tp: int = 1
    dp: int = 1
    cp: int = 1
    pp: int = 1
    order: tuple[int, ...] = ()
    kv: int = 1
    ends: bool = False
    shard: int = 0

    def __post_init__(self) -> None:
        for axis in AXES:
            if self.degree(axis) < 1:
                raise ConfigError(
                    f"mesh degree {axis}={self.degree(axis)} is below 1; use 1 or more"
                )
        if self.order and sorted(self.order) != [*range(self.world_size)]:
            raise ValueError(f"order {self.order} does not place {self.world_size} ranks")
        if self.dp * self.cp % self.owners:
            raise ValueError(f"runs of {self.shard} do not tile {self.dp * self.cp} data ranks")

    @classmethod
    def fill(
        cls,
        world_size: int,
        tp: int = 1,
        cp: int = 1,
        pp: int = 1,
        kv: int = 1,
        ends: bool = False,
        shard: int = 0,
    ) -> Mesh:
        """The mesh of ``world_size`` ranks whose data axis takes what the other axes leave.

        Raises ConfigError if the axes do not divide the world.
        """
        rest, over = divmod(world_size, tp * cp * pp)
        if over or not rest:
            raise ConfigError(
                f"a world of {count(world_size, 'rank')} is not divided by tensor {tp} x context "
                f"{cp} x pipeline {pp} = {tp * cp * pp}; start a multiple of {tp * cp * pp} ranks"
            )
        return cls(tp=tp, dp=rest, cp=cp, pp=pp, kv=kv, ends=ends, shard=shard)

    def on_trn1(self, cores: int = 32) -> Mesh:
        """This mesh where trn1 wants it, on nodes with ``cores`` ranks each.

        Four tensor ranks are cores r, r + 8, r + 16, r + 24 of one node; other degrees stay.
        """
        if self.tp != 4 or self.world_size % cores or cores % 4:
            return self
        far = cores // 4
        nodes, near = range(0, self.world_size, cores), range(far)
        return replace(
            self, order=tuple(node + r + k * far for node in nodes for r in near for k in range(4))
        )

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def owners(self) -> int:
        """The data and context ranks that share what ZeRO cuts."""
        return self.shard or self.dp * self.cp

    @property
    def copies(self) -> int:
        """The groups of such ranks, each with all of it."""
        return self.dp * self.cp // self.owners

    def degree(self, axis: str) -> int:
        """The number of ranks along ``axis`` (pp, dp, cp or tp)."""
        return {"pp": self.pp, "dp": self.dp, "cp": self.cp, "tp": self.tp}[axis]

    def coordinate(self, rank: int) -> Coordinate:
        """The place of global ``rank``; ValueError outside the world."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside a world of {self.world_size}")
        place, tp = divmod(self.order.index(rank) if self.order else rank, self.tp)
        place, cp = divmod(place, self.cp)
        pp, dp = divmod(place, self.dp)
        return Coordinate(pp=pp, dp=dp, cp=cp, tp=tp)

    def rank(self, at: Coordinate) -> int:
        """The global rank at a coordinate: the inverse of ``coordinate``."""
        place = ((at.pp * self.dp + at.dp) * self.cp + at.cp) * self.tp + at.tp
        return self.order[place] if self.order else place

    def groups(self, *axes: str) -> Groups:
        """All groups of ranks that differ only along ``axes``, in the grid's order.

        Several axes make one larger axis: ``groups("dp", "cp")`` is where gradients are summed.
        """
        return _groups(self, axes)

    def axes(self) -> dict[str, Groups]:
        """The groups of every axis that ranks communicate on, by its name in ``Axes``."""
        data, n = self.groups("dp", "cp"), self.owners
        found = {
            "tp": self.groups("tp"),
            "data": data,
            "kv": self.replicas("tp", self.kv),
            "world": (tuple(range(self.world_size)),),
            "cp": self.groups("cp"),
            **{name: pairs for name in EDGES if (pairs := self.edges(name))},
        }
        if self.copies > 1:
            found["shard"] = _runs(data, n)
            found["replica"] = tuple(g[i::n] for g in data for i in range(n))
        return found

    def edges(self, name: str) -> Groups:
        """Pairs of ranks that swap: of stages s and s + 1 for even or odd s, or of last and first.

        Ranks of a stage without such an edge are in no pair.
        """
        if name == "ends":
            return tuple((line[-1], line[0]) for line in self.groups("pp") if self.ends)
        stages = range(EDGES.index(name), self.pp - 1, 2)
        return tuple(line[s : s + 2] for s in stages for line in self.groups("pp"))

    def completed(self, pairs: Groups) -> Groups:
        """``pairs`` and more of them, of the ranks that are in none, for collectives that name all.

        The ranks of these further pairs never meet.
        """
        paired = {rank for pair in pairs for rank in pair}
        others = [rank for rank in self.order or range(self.world_size) if rank not in paired]
        half = len(others) // 2
        return (*pairs, *zip(others[:half], others[half:], strict=True))

    def replicas(self, axis: str, size: int) -> Groups:
        """The groups of ``axis`` broken into runs of ``size`` neighbours.

        With more tensor ranks than key/value heads, ``size = tp / heads`` neighbours hold one head.
        """
        if self.degree(axis) % size:
            raise ValueError(f"runs of {size} do not tile {axis}={self.degree(axis)}")
        return _runs(self.groups(axis), size)


def _runs(groups: Groups, size: int) -> Groups:
    """Groups broken into runs of ``size`` neighbours."""
    return tuple(g[i : i + size] for g in groups for i in range(0, len(g), size))


@lru_cache(maxsize=32)
def _groups(mesh: Mesh, axes: tuple[str, ...]) -> Groups:
    fixed = [axis for axis in AXES if axis not in axes]
    if len(fixed) != len(AXES) - len(set(axes)):
        raise ValueError(f"axes {axes} are not among {AXES}")
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in mesh.order or range(mesh.world_size):
        at = mesh.coordinate(rank)
        found.setdefault(tuple(getattr(at, axis) for axis in fixed), []).append(rank)
    return tuple(tuple(ranks) for ranks in found.values())
