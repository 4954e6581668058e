"""Early stopping of a resumed run: what the checkpoint says of it is not trusted."""

from __future__ import annotations

import math

import pytest

from llamax.runtime.errors import CheckpointError
from llamax.training.early_stopping import EarlyStopping


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
