"""The check of every step: a non-finite loss, skipped steps, requests to stop."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from llamax.runtime.errors import NotFinite
from llamax.training.step_check import StepCheck
from llamax.training.step_result import Step

# --- verdicts ------------------------------------------------------------------------------------


def step(
    number: int,
    loss: float = 1.0,
    norm: float = 1.0,
    stop: float = 0.0,
    bounds: tuple[float, ...] = (),
) -> Step:
    loss_, norm_, stop_ = (torch.tensor(value) for value in (loss, norm, stop))
    limits = [*map(torch.tensor, bounds)]
    return Step(number, loss_, norm_, torch.tensor(4.0), stop_, bounds=limits)


def overflow(number: int, scale: float, loss: float = 1.0) -> Step:
    made = step(number, loss, math.inf)
    made.loss_scale = [torch.tensor(value) for value in (scale, 0.0, number)]
    return made


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


def test_a_step_without_a_label_is_no_model_that_diverges(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As of instruction data where no sample of a small batch has an answer."""
    judge, empty = verdict(1), [step(number, math.nan, math.nan) for number in (7, 8)]
    for each in empty:
        each.tokens = torch.tensor(0.0)
        judge.add(each)
    expected = "none of its labels counts in the loss: no rank made an update"
    assert f"step 7: {expected}; samples 70, 71" in caplog.text
    with pytest.raises(NotFinite, match=rf"step 8: {expected}, .*, raise data.global_batch, or"):
        judge.check()


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


def test_an_overflow_can_ask_to_stop_as_well() -> None:
    judge, asked = verdict(3), overflow(1, 64.0)
    asked.requests = torch.tensor(1.0)
    judge.add(asked)
    assert judge.add(step(2))


def test_an_overflow_that_a_smaller_loss_scale_cures_is_not_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    judge = verdict(1)
    logging.getLogger("llamax").propagate = True
    caplog.set_level(logging.INFO, "llamax")
    for number in range(1, 18):
        judge.add(overflow(number, 2.0 ** (17 - number)))
    judge.check()
    assert caplog.messages[0] == (
        "step 1: a gradient overflowed in float16: no rank made an update, and the loss scale is "
        "now 65536"
    )
    judge.add(overflow(18, 0.5))
    judge.add(overflow(19, 0.25))
    with pytest.raises(NotFinite, match=r"step 19: .* 2 in a row"):
        judge.check()


def test_a_row_begins_at_its_first_skipped_step_whatever_overflows_inside_it() -> None:
    judge, nan = StepCheck(9, lambda step: [], rewind=2), math.nan
    judge.add(overflow(6, 1024.0))
    for made in (step(7, nan), overflow(8, 512.0), overflow(9, 256.0)):
        judge.add(made)
    assert (judge.skipped, judge.first, judge.rewind_due) == (1, 7, False)
    last = step(10, nan)
    assert judge.state(overflow(10, 128.0).result) == {"skipped_in_a_row": 1, "skipped_since": 7}
    judge.check()
    assert judge.state(last.result) == {"skipped_in_a_row": 2, "skipped_since": 7}
    judge.add(last)
    judge.check()
    assert (judge.skipped, judge.first, judge.rewind_due) == (2, 7, True)
    assert judge.state(step(11).result) == {}


def test_a_loss_that_is_not_finite_is_counted_at_any_scale() -> None:
    judge = verdict(0)
    judge.add(overflow(1, 1024.0, math.nan))
    with pytest.raises(NotFinite, match="step 1: loss nan"):
        judge.check()


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (9.25, 1.0, "loss 9.2500 is an outlier, above 5.0000"),
        (1.0, 2.5, "gradient norm 2.5000 is an outlier, above 2.0000"),
        (9.25, 2.5, "loss 9.2500 is an outlier, above 5.0000, gradient norm 2.5000 is an outlier"),
        (math.inf, 1.0, "loss inf, gradient norm 1.0"),
        (1.0, math.nan, "loss 1.0, gradient norm nan"),
    ],
)
def test_an_outlier_is_named_with_its_samples(
    loss: float, norm: float, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    judge = verdict(1)
    logging.getLogger("llamax").propagate = True
    judge.add(step(1, 5.0, 2.0, bounds=(5.0, 2.0)))
    judge.add(step(2, loss, norm, bounds=(5.0, 2.0)))
    assert not caplog.text
    judge.add(step(3, loss, norm, bounds=(5.0, 2.0)))
    assert f"step 2: {reason}" in caplog.text
    assert ": no rank made an update; samples 20, 21" in caplog.text
    with pytest.raises(NotFinite, match=r"step 3: .* 2 in a row; look at samples 30, 31"):
        judge.check()


def test_a_resumed_run_goes_on_counting_in_a_row() -> None:
    judge = StepCheck(2, lambda step: [], skipped=2)
    judge.add(step(1, math.nan))
    with pytest.raises(NotFinite, match="3 in a row"):
        judge.check()
