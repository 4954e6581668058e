"""The five verbs over ``xm``, executed: each against its definition, on every axis of a mesh."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch_xla", reason="needs torch-xla: `make test` runs this in .venv-xla")

import torch
from support import ranks
from torch import Tensor

from llamax.parallel.collectives import Axis
from llamax.parallel.mesh import Mesh

MESH = Mesh(tp=2, dp=2)
VERBS = {
    "sum": lambda axis, x: axis.all_reduce(x),
    "max": lambda axis, x: axis.all_reduce(x, "max"),
    "gather 0": lambda axis, x: axis.all_gather(x, 0),
    "gather -1": lambda axis, x: axis.all_gather(x, -1),
    "scatter 0": lambda axis, x: axis.reduce_scatter(x, 0),
    "scatter -1": lambda axis, x: axis.reduce_scatter(x, -1),
    "to all 0 1": lambda axis, x: axis.all_to_all(x, 0, 1),
    "to all -1 -2": lambda axis, x: axis.all_to_all(x, -1, -2),
    "shift 1": lambda axis, x: axis.shift(x),
    "shift -1": lambda axis, x: axis.shift(x, -1),
    "shift 0": lambda axis, x: axis.shift(x, 0),
    "input": lambda axis, x: x,
}


def whole() -> Tensor:
    """What the four ranks hold, small integers, so that bfloat16 is exact: [4, 4, 8]."""
    return torch.randint(-30, 30, (4, 4, 8), generator=torch.Generator().manual_seed(0)).float()


def verbs(rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    import torch_xla

    from llamax.backends import xla

    axes = xla.axes(replace(MESH, kv=2), rank, torch_xla.device(), widen=True)
    x = whole()[rank].to(dtype).to(torch_xla.device())
    found: dict[str, Tensor] = {}
    for axis in (axes.tp, axes.data, axes.kv, axes.world):
        for name, verb in VERBS.items():
            found[f"{axis.name} {name}"] = verb(axis, x)
        found[f"{axis.name} rank"] = axis.rank_index + 0
    torch_xla.sync()
    return {name: y.cpu() for name, y in found.items()}


def expected(name: str, held: list[Tensor], rank: int) -> Tensor:
    """What ``rank`` of an axis gets where its ranks hold ``held``, in the words of the protocol."""
    verb, *numbers = name.removeprefix("to ").split()
    first, second = [*map(int, numbers), 0, 0][:2]
    size = len(held)
    if verb == "sum":
        return torch.stack(held).sum(0)
    if verb == "max":
        return torch.stack(held).amax(0)
    if verb == "gather":
        return torch.cat(held, first)
    if verb == "scatter":
        return torch.stack(held).sum(0).chunk(size, first)[rank]
    if verb == "all":
        return torch.cat([x.chunk(size, first)[rank] for x in held], second)
    if verb == "shift":
        return held[(rank - first) % size]
    return held[rank]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_verb_on_every_axis(dtype: torch.dtype) -> None:
    groups = {
        "tp": MESH.groups("tp"),
        "data": MESH.groups("dp"),
        "kv": MESH.groups("tp"),
        "world": ((0, 1, 2, 3),),
    }
    for rank, found in enumerate(ranks.run(4, verbs, dtype)):
        for axis, every in groups.items():
            group = next(group for group in every if rank in group)
            held = [whole()[member].to(dtype) for member in group]
            mine = group.index(rank)
            assert found[f"{axis} rank"].item() == mine
            for name in VERBS:
                torch.testing.assert_close(
                    found[f"{axis} {name}"], expected(name, held, mine), rtol=0, atol=0
                )


def uneven(rank: int) -> list[str]:
    import torch_xla

    from llamax.backends import xla

    axis: Axis = xla.axes(MESH, rank, torch_xla.device()).tp
    x = torch.zeros(3, 4).to(torch_xla.device())
    found = []
    for call in (lambda: axis.reduce_scatter(x, 0), lambda: axis.all_to_all(x, -2, 1)):
        with pytest.raises(ValueError) as caught:
            call()
        found.append(str(caught.value))
    return found


def test_what_does_not_part_is_refused() -> None:
    for found in ranks.run(4, uneven):
        assert found == ["tp: dim 0 of (3, 4) is not divisible by 2"] * 2


def begun(rank: int) -> float:
    import torch_xla

    from llamax.backends import xla

    device = torch_xla.device()
    return float(xla.begin_collectives(xla.axes(MESH, rank, device).world, device))


def test_all_ranks_are_in_the_first_sum() -> None:
    assert ranks.run(4, begun) == [4.0] * 4
