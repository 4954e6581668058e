"""float16 with a loss scale: all meshes skip, shrink and grow alike, and step as float32 does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import TINY as MODEL
from support.step_reference import OPTIM, build, share, training
from support.world import Worlds, axes

from llamax.optim.loss_scale import LossScale, LossScaleState
from llamax.parallel.collectives import Axes
from llamax.parallel.mesh import Mesh
from llamax.training.step import TrainState

TOO_LARGE, GOOD = LossScaleState(2.0**30), LossScaleState(1024.0, 1, 3)


def state_of(my_axes: Axes, zero: int, dtype: torch.dtype) -> TrainState:
    llama = build(MODEL, my_axes, my_axes.tp.size > 1).to(dtype)
    state = training(llama, my_axes, zero)
    if dtype == torch.float32:
        return state
    return replace(state, loss_scale=LossScale(TOO_LARGE, torch.device("cpu"), 2))


def on_mesh(mesh: Mesh, zero: int) -> dict[str, Any]:
    """An overflow, then two updates: what this rank saw, and how far float32 on one rank is."""
    solo = state_of(Axes.solo(), 0, torch.float32)
    whole = [solo.step(share(solo.axes, 1), number) for number in (1, 2)]
    my_axes = axes(mesh, max(1, mesh.tp // MODEL.num_key_value_heads))
    state = state_of(my_axes, zero, torch.float16)
    scaling = state.loss_scale
    assert scaling is not None

    def content() -> list[torch.Tensor]:
        held = [p.detach().clone() for p in state.model.parameters() if not p.is_meta]
        return held + [run.tensor.clone() for run in state.optimizer.owned()]

    before = content()
    seen = [state.step(share(my_axes, 2), 1).result]
    same = all(torch.equal(a, b) for a, b in zip(before, content(), strict=True))
    scaling.load(GOOD)
    seen.append(state.step(share(my_axes, 2), 4).result)
    seen.append(state.step(share(my_axes, 2), 5).result)
    return {
        "same": same,
        "finite": [not result.skipped for result in seen],
        "scales": [result.loss_scale for result in seen],
        "norms": [result.grad_norm for result in seen[1:]],
        "losses": [result.loss for result in seen[1:]],
        "float32": [(float(step.loss), float(step.grad_norm)) for step in whole],
    }


MESHES = [(Mesh(tp=2, dp=2), zero) for zero in (0, 1, 2, 3)]
MESHES += [(Mesh(pp=2, dp=2), 1), (Mesh(tp=2, cp=2), 1), (Mesh(tp=4), 1)]


@pytest.mark.parametrize(("mesh", "zero"), MESHES, ids=str)
def test_meshes_decide_alike_and_step_as_float32(worlds: Worlds, mesh: Mesh, zero: int) -> None:
    assert OPTIM.max_grad_norm == 0.5, "below the norm: it is clipped, once the scale is divided"
    for seen in worlds(4).run(on_mesh, mesh, zero):
        assert seen["same"]
        assert seen["finite"] == [False, True, True]
        assert seen["scales"] == [
            LossScaleState(2.0**29, 0, 1),
            LossScaleState(2048.0, 0, 3),
            LossScaleState(2048.0, 1, 3),
        ]
        for (loss, norm), got in zip(
            seen["float32"], zip(seen["losses"], seen["norms"], strict=True), strict=True
        ):
            assert got == (pytest.approx(loss, rel=2e-3), pytest.approx(norm, rel=1e-2))
            assert norm > 0.5
