"""The check of every step: a non-finite loss, skipped steps, requests to stop."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from llamax.runtime.errors import NotFinite
from llamax.training.step import Step
from llamax.training.step_check import StepCheck

# --- verdicts ------------------------------------------------------------------------------------


def fetch(tensors: Sequence[Tensor]) -> list[float]:
    return [float(tensor) for tensor in tensors]


def step(loss: float = 1.0, norm: float = 1.0, stop: float = 0.0) -> Step:
    loss_, norm_, stop_ = (torch.tensor(value) for value in (loss, norm, stop))
    return Step(loss_, norm_, torch.tensor(4.0), stop_)


def verdict(most_skipped: int) -> StepCheck:
    return StepCheck(fetch, most_skipped, lambda step: [10 * step, 10 * step + 1])


def test_a_request_to_stop_is_seen_one_step_late() -> None:
    judge = verdict(0)
    assert not judge.add(1, step())
    assert not judge.add(2, step(stop=1.0))
    assert judge.add(3, step())
    assert not judge.judge()
    assert not judge.judge(), "nothing is pending"


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, math.nan), (1.0, math.inf), (math.inf, 1.0)])
def test_the_first_bad_step_ends_a_run_that_skips_none(
    loss: float, norm: float, caplog: pytest.LogCaptureFixture
) -> None:
    judge = verdict(0)
    judge.add(6, step())
    judge.add(7, step(loss, norm))
    with pytest.raises(NotFinite, match=r"step 7: loss .* 1 in a row; look at samples 70, 71"):
        judge.add(8, step())


def test_skipped_steps_are_counted_in_a_row(caplog: pytest.LogCaptureFixture) -> None:
    judge, bad = verdict(2), step(math.nan, math.nan)
    logging.getLogger("llamax").propagate = True
    for number, found in enumerate((bad, bad, step(), bad, bad)):
        judge.add(number, found)
    judge.judge()
    assert "step 1: loss nan" in caplog.text
    assert "samples 10, 11" in caplog.text
    judge.add(9, bad)
    with pytest.raises(NotFinite, match="3 in a row"):
        judge.judge()


def test_a_bad_step_can_ask_to_stop_as_well() -> None:
    judge = verdict(5)
    judge.add(1, step(math.nan, math.nan, 1.0))
    assert judge.judge()
