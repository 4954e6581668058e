"""Axes between the stages of a pipeline that line up replicas of torch-xla (support/ranks.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from llamax.backends.xla import Xla
from llamax.parallel.collectives import Axes, Axis
from llamax.parallel.mesh import Mesh
from llamax.parallel.pipeline import edge_name
from support import ranks
from support.metering import Meter, Metered


class Meeting(Metered):
    """An axis between stages: the next program is one that ``members`` share."""

    def __init__(self, axis: Axis, name: str, members: tuple[int, ...]) -> None:
        super().__init__(axis, Meter())
        self.group = name, members

    def all_reduce(self, x: Tensor, op: Any = "sum") -> Tensor:
        ranks.LABEL.group = self.group
        return super().all_reduce(x, op)

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        ranks.LABEL.group = self.group
        return super().all_gather(x, dim)


def meeting(axes: Axes, mesh: Mesh) -> Axes:
    """``axes`` that say who meets where stages do."""
    number, stages = axes.pp
    each, world = mesh.world_size // stages, tuple(range(mesh.world_size))
    found: dict[str, Axis] = {"world": Meeting(axes.world, "world", world)}
    for edge in range(stages if mesh.ends else stages - 1):
        pair = edge, (edge + 1) % stages
        if number in pair:
            both = tuple(sorted(s * each + rank for s in pair for rank in range(each)))
            name = edge_name(edge, stages)
            found[name] = Meeting(axes.edge(edge), f"edge {edge}", both)
    return replace(axes, **found)


def joined_in_lanes() -> None:
    """Let every backend of this process join its mesh with axes that say who meets."""
    joined = Xla.joined

    @contextmanager
    def joined_meeting(self: Xla, mesh: Mesh, timeout_s: float) -> Iterator[Axes]:
        with joined(self, mesh, timeout_s) as axes:
            yield meeting(axes, mesh)

    Xla.joined = joined_meeting  # type: ignore[method-assign]
