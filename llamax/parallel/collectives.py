"""Collectives: five functional operations (verbs) on one axis of the mesh.

Every verb returns a new tensor and never writes its input: an in-place all-reduce inside an
``autograd.Function`` gives silently wrong gradients when the value was saved for backward.
``Solo`` is the axis of size one, where every verb is the identity, so nothing above this line asks
whether there is more than one rank.  Backends implement ``Axis`` for their devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from llamax.parallel.mesh import ALONE, Groups, Mesh, Seat
from llamax.parallel.pipeline import edge_name

Reduction = Literal["sum", "max"]


class Axis(Protocol):
    """One axis of the mesh as one rank sees it.

    ``rank_index`` is ``rank`` as an integer tensor [1] on the device: graphs that depend on the
    rank read it from there, so that every rank traces the same program.  (torch-xla sends what has
    a dim; a 0-d 0 or 1 it would build into the graph.)
    """

    name: str
    size: int
    rank: int
    rank_index: Tensor

    def all_reduce(self, x: Tensor, op: Reduction = "sum") -> Tensor:
        """The sum (or maximum) over ranks: [...] -> [...]."""
        ...

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """All ranks' tensors in rank order along ``dim``: [.., n, ..] -> [.., size * n, ..]."""
        ...

    def start_all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin ``all_gather(x, 0)``; the function returned waits for it.

        Devices that trace programs gather in that function: their compiler decides when.
        """
        return partial(self.all_gather, x, 0)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        """This rank's share along ``dim`` of the sum: [.., size * n, ..] -> [.., n, ..]."""
        ...

    def start_reduce_scatter(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin ``reduce_scatter(x, 0)``, as ``start_all_gather`` does; ``x`` is left alone."""
        return partial(self.reduce_scatter, x, 0)

    def all_to_all(self, x: Tensor, split: int, concat: int) -> Tensor:
        """Send share j along ``split`` to rank j, join what arrives along ``concat``."""
        ...

    def shift(self, x: Tensor, by: int = 1) -> Tensor:
        """The tensor of rank ``rank - by``, around the ring: [...] -> [...]."""
        return self.start_shift(x, by)()

    def start_shift(self, x: Tensor, by: int = 1) -> Callable[[], Tensor]:
        """Begin ``shift(x, by)``; the function returned waits for it.

        Devices that trace programs record it here: the order of their shifts is that of the starts.
        """
        ...


class Solo(Axis):
    """An axis of size one: every verb is the identity."""

    size = 1
    rank = 0

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        self.name = name
        self.rank_index = torch.zeros(1, dtype=torch.int32).to(device)

    def all_reduce(self, x: Tensor, op: Reduction = "sum") -> Tensor:
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return x

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        return x

    def all_to_all(self, x: Tensor, split: int, concat: int) -> Tensor:
        return x

    def start_shift(self, x: Tensor, by: int = 1) -> Callable[[], Tensor]:
        return lambda: x


@dataclass(frozen=True)
class Axes:
    """The axes of a mesh as one rank sees them.

    ``data`` is where gradients are summed (dp x cp).  Of its ranks those of ``shard`` share what
    ZeRO cuts, all or some neighbours, and those of ``replica`` hold the same of it.  ``kv`` joins
    the neighbouring tensor ranks that hold the same key/value head; it has size one unless tensor >
    num_key_value_heads.  The ranks of ``cp`` hold parts of the same sequences.  ``pp`` is the stage
    of this rank; on ``even`` and ``odd`` it meets the ranks of the stages next to it, over the
    edges of that parity; on ``ends`` the last stage meets the first.
    """

    tp: Axis
    data: Axis
    kv: Axis
    world: Axis
    cp: Axis = field(default_factory=lambda: Solo("cp"))
    even: Axis = field(default_factory=lambda: Solo("even"))
    odd: Axis = field(default_factory=lambda: Solo("odd"))
    ends: Axis = field(default_factory=lambda: Solo("ends"))
    pp: Seat = ALONE
    group: Axis | None = None  # ``shard`` where it is a part of ``data``
    replica: Axis = field(default_factory=lambda: Solo("replica"))

    @classmethod
    def of(cls, mesh: Mesh, rank: int, make: Callable[[str, Groups], Axis]) -> Axes:
        """The axes of global ``rank`` of ``mesh``; ``make`` makes one from its name and groups."""
        made = {name: make(name, groups) for name, groups in mesh.axes().items()}
        group = made.pop("shard", None)
        return cls(**made, pp=Seat(mesh.coordinate(rank).pp, mesh.pp), group=group)

    @classmethod
    def solo(cls, device: torch.device | str = "cpu") -> Axes:
        """The axes of a world of one."""
        tp, data, kv, world = (Solo(name, device) for name in ("tp", "data", "kv", "world"))
        return cls(tp, data, kv, world, Solo("cp", device))

    @property
    def shard(self) -> Axis:
        """The data ranks that share weights, gradients and state as far as ZeRO cuts them."""
        return self.data if self.group is None else self.group

    def owners(self, zero: int) -> tuple[Axis, Axis]:
        """``shard`` and ``replica`` at a ZeRO stage: in stage 0 each data rank owns everything."""
        if zero:
            return self.shard, self.replica
        return Solo("shard", self.data.rank_index.device), self.data

    @property
    def dp(self) -> Seat:
        """This rank among those of ``data`` that take different samples."""
        return Seat(self.data.rank // self.cp.size, self.data.size // self.cp.size)

    def edge(self, number: int) -> Axis:
        """The axis of two ranks between stage ``number`` and the one above it."""
        return {"even": self.even, "odd": self.odd, "ends": self.ends}[
            edge_name(number, self.pp.size)
        ]

    @property
    def part(self) -> Seat:
        """This rank among those that take parts of the same samples."""
        return Seat(self.cp.rank, self.cp.size)
