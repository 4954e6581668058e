"""Outliers on several ranks: a run with skipped steps equals the run without them, bit for bit.

Weights, moments and window, on every mesh and in every ZeRO stage, with a spike on one rank alone;
and all ranks decide alike where a rank's own window says something else.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from support.spikes import SPIKES, train
from support.world import Worlds, axes
from torch import Tensor

from llamax.backends.of_rank_0 import of_rank_0
from llamax.optim.spikes import SpikeFilter
from llamax.optim.zero import Zero
from llamax.parallel.mesh import Mesh
from llamax.parallel.rendezvous import Rendezvous


def compared(
    mesh: Mesh, zero: int, mutation: str = "none", wrong: int | None = None
) -> tuple[list[int], list[int], bool]:
    """Skipped and unchanged steps, and whether the run equals the one without them to the bit."""
    own = axes(mesh)
    with MUTATIONS[mutation]():
        skipped, unchanged, state = train(own, zero, own.world.size - 1, wrong)
    nothing, none, clean = train(own, zero, None)
    assert nothing == none == []
    return skipped, unchanged, all(map(torch.equal, state, clean))


@pytest.mark.parametrize(
    ("mesh", "zero"),
    [
        *((Mesh(tp=2, dp=2), zero) for zero in (0, 1, 2, 3)),
        (Mesh(tp=4, kv=2), 1),
        (Mesh(pp=2, dp=2), 1),
    ],
)
def test_a_skipped_step_leaves_no_trace(worlds: Worlds, mesh: Mesh, zero: int) -> None:
    assert worlds(4).run(compared, mesh, zero) == 4 * [(SPIKES, SPIKES, True)]


def test_all_ranks_decide_as_rank_0_does(worlds: Worlds) -> None:
    found = worlds(2).run(compared, Mesh(dp=2), 1, "none", 1)
    assert [unchanged for _, unchanged, _ in found] == 2 * [SPIKES]


# --- planted defects -----------------------------------------------------------------------------


def own_bounds() -> AbstractContextManager[Any]:
    """Each rank decides by its own window."""
    own = SpikeFilter.accepts

    def accepts(self: SpikeFilter, bounds: Any, loss: Tensor, norm: Tensor) -> Tensor:
        return own(self, [*self.bounds()], loss, norm)

    return mock.patch.object(SpikeFilter, "accepts", accepts)


def patched(name: str, change: Callable[..., Any]) -> Callable[[], AbstractContextManager[Any]]:
    original = getattr(SpikeFilter, name)
    return lambda: mock.patch.object(SpikeFilter, name, lambda *args: change(original, *args))


def moments_touched() -> AbstractContextManager[Any]:
    """The moments of a skipped step decay, as if its gradient were zero."""
    original = Zero.step

    def step(self: Zero, *args: Any) -> Tensor:
        norm = original(self, *args)
        for run in self.owned():
            if run.kind == "exp_avg":
                run.tensor.mul_(torch.where(args[3](norm), 1.0, self.optim.beta1))
        return norm

    return mock.patch.object(Zero, "step", step)


MUTATIONS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": nullcontext,
    "decision per rank": own_bounds,
    "moments touched": moments_touched,
    "outliers in the window": patched(
        "add", lambda add, self, bounds, loss, norm: add(self, [loss + 1, norm + 1], loss, norm)
    ),
    "skipped steps in the bias correction": patched(
        "add", lambda add, self, *numbers: (add(self, *numbers), self.skipped.zero_())
    ),
    "norm of this rank alone": patched(
        "accepts", lambda accepts, self, bounds, loss, norm: accepts(self, bounds, loss, norm / 99)
    ),
}


@pytest.mark.parametrize("mutation", [name for name in MUTATIONS if name != "none"])
def test_planted_defects_are_caught(worlds: Worlds, mutation: str) -> None:
    wrong = 1 if mutation == "decision per rank" else None
    found = worlds(2).run(compared, Mesh(dp=2), 1, mutation, wrong)
    if wrong is None:
        assert found != 2 * [(SPIKES, SPIKES, True)]
    else:
        assert [unchanged for _, unchanged, _ in found] != 2 * [SPIKES]


def from_rank_0(values: list[int]) -> list[int]:
    own = axes(Mesh(dp=2)).world
    where = Rendezvous(rank=own.rank, world_size=own.size)
    return [of_rank_0(where, f"test {n}", value * (1 - own.rank)) for n, value in enumerate(values)]


def test_all_ranks_get_the_number_of_rank_0(worlds: Worlds) -> None:
    assert worlds(2).run(from_rank_0, [40, -1, 0]) == 2 * [[40, -1, 0]]
    assert of_rank_0(Rendezvous(), "test", 7) == 7
