"""The check of every step: a non-finite loss, skipped steps, requests to stop."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from llamax.runtime.errors import NotFinite
from llamax.training.step import Step
from llamax.training.step_check import StepCheck

# --- verdicts ------------------------------------------------------------------------------------


def step(number: int, loss: float = 1.0, norm: float = 1.0, stop: float = 0.0) -> Step:
    loss_, norm_, stop_ = (torch.tensor(value) for value in (loss, norm, stop))
    return Step(number, loss_, norm_, torch.tensor(4.0), stop_)


def verdict(most_skipped: int) -> StepCheck:
    return StepCheck(most_skipped, lambda step: [10 * step, 10 * step + 1])


def test_a_request_to_stop_is_seen_one_step_late() -> None:
    judge = verdict(0)
    assert not judge.add(step(1))
    assert not judge.add(step(2, stop=1.0))
    assert judge.add(step(3))
    assert not judge.check()
    assert not judge.check(), "nothing is pending"


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, math.nan), (1.0, math.inf), (math.inf, 1.0)])
def test_the_first_bad_step_ends_a_run_that_skips_none(
    loss: float, norm: float, caplog: pytest.LogCaptureFixture
) -> None:
    judge = verdict(0)
    judge.add(step(6))
    judge.add(step(7, loss, norm))
    with pytest.raises(NotFinite, match=r"step 7: loss .* 1 in a row; look at samples 70, 71"):
        judge.add(step(8))


def test_skipped_steps_are_counted_in_a_row(caplog: pytest.LogCaptureFixture) -> None:
    judge, nan = verdict(2), math.nan
    logging.getLogger("llamax").propagate = True
    for number, loss in enumerate((nan, nan, 1.0, nan, nan)):
        judge.add(step(number, loss, loss))
    judge.check()
    assert "step 1: loss nan" in caplog.text
    assert "samples 10, 11" in caplog.text
    judge.add(step(9, nan, nan))
    with pytest.raises(NotFinite, match="3 in a row"):
        judge.check()


def test_a_bad_step_can_ask_to_stop_as_well() -> None:
    judge = verdict(5)
    judge.add(step(1, math.nan, math.nan, 1.0))
    assert judge.check()
