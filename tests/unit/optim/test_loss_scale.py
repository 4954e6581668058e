"""The loss scale decides as torch.amp.GradScaler does, from the norm alone."""

from __future__ import annotations

import math
import random

import pytest
import torch

from llamax.config.schema import OptimConfig
from llamax.optim.loss_scale import BACKOFF, GROWTH, LossScale, LossScaleState
from llamax.parallel import cross_entropy
from llamax.parallel.collectives import Solo
from llamax.runtime.errors import CheckpointError

CPU = torch.device("cpu")
LABELS = torch.tensor(8.0)


def torch_decisions(
    first: float, interval: int, norms: list[float]
) -> list[tuple[float, int, bool]]:
    """Scale and good steps of GradScaler after each step, and whether it made an update."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", first, GROWTH, BACKOFF, interval)
    found = []
    for norm in norms:
        scaler.scale(weight.sum())  # it makes its tensors when it is first used
        weight.grad = torch.tensor([norm, 0.0])
        weight.data.zero_()  # where every update is seen
        scaler.step(optimizer)
        scaler.update()
        state = scaler.state_dict()
        found.append((state["scale"], state["_growth_tracker"], bool(weight.any())))
    return found


@pytest.mark.parametrize("first", [65536.0, 1.0, 2.0**126, 2.0**-140])
def test_every_decision_is_that_of_torch(first: float) -> None:
    random.seed(0)
    bad = (math.inf, -math.inf, math.nan)
    for interval in (1, 2, 5, 1, 2, 5):
        norms = [random.choice((1.0, 1.0, 1.0, random.choice(bad))) for _ in range(40)]
        scale = LossScale(LossScaleState(first), CPU, interval)
        skipped = 0
        for norm, wanted in zip(norms, torch_decisions(first, interval, norms), strict=True):
            scale.update(torch.tensor(norm), LABELS)
            skipped += not wanted[2]
            numbers = [float(tensor) for tensor in scale.tensors]
            assert LossScaleState.of(numbers) == LossScaleState(*wanted[:2], skipped)


def test_a_checkpoint_holds_every_bit_of_it() -> None:
    state = LossScaleState(2.0**-149, 1999, 7)
    assert LossScaleState.from_json(state.to_json()) == state
    assert LossScaleState.from_json({"seed": 0}) is None
    scale = LossScale(LossScaleState(1.0), CPU, 2000)
    scale.load(state)
    scale.update(torch.tensor(1.0), LABELS)
    assert LossScaleState.of([float(tensor) for tensor in scale.tensors]) == LossScaleState(
        2.0**-148, 0, 7
    )


def test_a_step_without_a_label_leaves_the_scale_and_the_row_of_updates() -> None:
    """Its norm is NaN, as its loss is 0 / 0, and nothing overflowed; AdamW counts no update."""
    scale = LossScale(LossScaleState(8.0), CPU, 3)
    for norm, labels, wanted in (
        (1.0, 4.0, LossScaleState(8.0, 1, 0)),
        (math.nan, 0.0, LossScaleState(8.0, 1, 1)),
        (1.0, 4.0, LossScaleState(8.0, 2, 1)),
        (math.nan, 4.0, LossScaleState(4.0, 0, 2)),
    ):
        scale.update(torch.tensor(norm), torch.tensor(labels))
        assert LossScaleState.of([float(tensor) for tensor in scale.tensors]) == wanted


@pytest.mark.parametrize(
    "damaged",
    [
        *(3.0, None, [], {}, {"scale": "8"}, {"scale": 0.0}, {"scale": math.inf}, {"scale": True}),
        *(
            {"scale": 8.0, "good_steps": -1},
            {"scale": 8.0, "overflowed_steps": 1.5},
            {"other": 8.0},
        ),
    ],
)
def test_a_damaged_scale_of_a_checkpoint_is_refused(damaged: object) -> None:
    with pytest.raises(CheckpointError, match="which is no loss scale with counts of steps"):
        LossScaleState.from_json({"loss_scale": damaged})


def test_a_caller_may_keep_the_numbers_of_a_step() -> None:
    scale = LossScale(LossScaleState(8.0), CPU, 1)
    kept = scale.tensors
    scale.update(torch.tensor(1.0), LABELS)
    assert [float(tensor) for tensor in kept] == [8.0, 0.0, 0.0]


def test_small_probabilities_have_a_gradient_in_float16() -> None:
    """Without a gain the gradient of a confident token would round to a multiple of 2**-24."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, 8, 16), torch.randn(50, 16)
    labels = (x @ weight.T).argmax(-1)
    x = x * 4  # so that most are certain

    def gradients(dtype: torch.dtype, scale: float) -> list[torch.Tensor]:
        mine = [part.to(dtype).requires_grad_() for part in (x, weight)]
        total, _ = cross_entropy.vocab_parallel_loss(*mine, labels, Solo("tp"), 50)
        (total * scale).backward()
        return [part.grad.double() / scale for part in mine]

    for got, want in zip(
        gradients(torch.float16, 1024.0), gradients(torch.float32, 1.0), strict=True
    ):
        rows = want.abs().amax(-1)
        assert rows.min() < 1e-6, "below the least number of float16 with all its digits"
        seen = (got - want).abs().amax(-1) / rows
        assert seen[rows > 2e-9].max() < 0.02


def test_the_settings_are_those_of_torch() -> None:
    scaler = torch.amp.GradScaler("cpu")
    assert (OptimConfig().loss_scale, OptimConfig().loss_scale_interval, GROWTH, BACKOFF) == (
        scaler._init_scale,
        scaler.get_growth_interval(),
        scaler.get_growth_factor(),
        scaler.get_backoff_factor(),
    )
