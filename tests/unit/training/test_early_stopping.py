"""Early stopping: where a run ends, resumed or not; what a checkpoint says of it is not trusted."""

from __future__ import annotations

import math

import pytest
import torch

from llamax.runtime.errors import CheckpointError
from llamax.training.early_stopping import EarlyStopping
from llamax.training.step_result import Step


def validated(loss: float) -> Step:
    """A step after which there was a validation."""
    step = Step(1, *torch.tensor([2.0, 1.0, 64.0, 0.0]))
    step.validation_loss = torch.tensor(loss)
    return step


@pytest.mark.parametrize("resumed_after", range(7))
def test_a_run_ends_where_an_unbroken_one_would(resumed_after: int) -> None:
    """At the second validation in a row that is not lower: equal, higher and NaN ones are not."""
    stopping, ends = EarlyStopping(2, {}), []
    for number, loss in enumerate([3.0, 3.0, 2.0, math.nan, 1.5, 1.5, 1.75]):
        if number == resumed_after:
            stopping = EarlyStopping(2, stopping.state())
        stopping.add(validated(loss))
        ends.append(stopping.over)
    assert ends == [*[False] * 6, True]


@pytest.mark.parametrize(
    "state",
    [
        {"best_validation_loss": {"a": 1}},
        {"best_validation_loss": "1.5"},
        {"best_validation_loss": True},
        {"best_validation_loss": None},
        {"best_validation_loss": 10**400},
        {"validations_waited": [2]},
        {"validations_waited": 1.5},
        {"validations_waited": -1},
    ],
)
def test_a_damaged_state_is_one_line(state: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"the checkpoint to resume has best_validation_loss"):
        EarlyStopping(3, state)


def test_a_sound_state_goes_on() -> None:
    assert EarlyStopping(3, {}).best == math.inf
    resumed = EarlyStopping(3, {"best_validation_loss": 2, "validations_waited": 3})
    assert (resumed.best, resumed.waited, resumed.over) == (2.0, 3, True)
    assert math.isnan(EarlyStopping(3, {"best_validation_loss": math.nan}).best)
