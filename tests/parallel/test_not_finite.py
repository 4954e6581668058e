"""NaN on one rank at one step: no rank makes the update, and all of them conclude the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support.models import TINY as MODEL
from support.world import Worlds, axes

from llamax.config.schema import OptimConfig
from llamax.data.loader import Batch
from llamax.model.llama import Llama
from llamax.optim.zero import Zero
from llamax.parallel.mesh import Mesh
from llamax.runtime.errors import NotFinite
from llamax.training.step import TrainState
from llamax.training.step_check import StepCheck


def train(mesh: Mesh, victim: int, what: str, bad_step: int, zero: int) -> list[str]:
    """Three steps, one of them spoilt on one rank: what this rank did and concluded in each."""
    mine = axes(mesh, max(1, mesh.tp // MODEL.num_key_value_heads))
    model = Llama(MODEL, mine.tp).init(0)
    optimizer = Zero(
        model.sharded_parameters(),
        OptimConfig(),
        mine,
        sequence_parallel=False,
        zero=zero,
        bucket_bytes=2048,
    )
    state = TrainState(
        model,
        optimizer,
        mine,
        step_tokens=8 * mine.data.size,
        learning_rate=lambda step: 1e-2,
    )
    judge, said = StepCheck(0, lambda step: [step]), []
    loss, value = model.loss, math.nan if what.startswith("nan") else math.inf
    for step in (1, 2, 3):
        spoilt = step == bad_step and mine.world.rank == victim

        def spoil(*args: object, _loss: Callable[..., tuple[torch.Tensor, torch.Tensor]] = loss,
                  **options: object) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
            total, count = _loss(*args, **options)
            if what.endswith("loss"):
                return total + value, count
            total.register_hook(lambda gradient: gradient * value)
            return total, count

        model.loss = spoil if spoilt else loss  # type: ignore[method-assign]
        before = [p.detach().clone() for p in model.parameters() if not p.is_meta]
        owned = [run.tensor.clone() for run in optimizer.owned()]
        ids = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(step))
        row = ids[mine.data.rank % 2 : mine.data.rank % 2 + 1]
        batch = Batch(row[:, :-1], row[:, 1:], torch.arange(8).expand(1, 8), None)
        found = state.step([batch], step)
        parts = [
            *(p for p in model.parameters() if not p.is_meta),
            *(run.tensor for run in optimizer.owned()),
        ]
        same = all(torch.equal(a, b) for a, b in zip(parts, [*before, *owned], strict=True))
        judge.add(found)
        try:
            judge.check()
            verdict = "goes on"
        except NotFinite:
            verdict = "stops"
        said.append(f"{'no update' if same else 'update'}, {verdict}")
    return said


@pytest.mark.parametrize("what", ["nan loss", "inf loss", "nan gradient"])
@pytest.mark.parametrize(
    ("mesh", "zero"), [(Mesh(tp=2, dp=2), zero) for zero in (0, 1, 2, 3)] + [(Mesh(tp=4), 1)]
)
def test_no_rank_updates_and_all_conclude_alike(
    worlds: Worlds, mesh: Mesh, zero: int, what: str
) -> None:
    for victim in (1, 2):
        said = worlds(4).run(train, mesh, victim, what, 2, zero)
        assert said == 4 * [["update, goes on", "no update, stops", "update, goes on"]]
