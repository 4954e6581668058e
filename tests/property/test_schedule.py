"""The learning rate stays in bounds, has no jumps, and starts and ends as configured."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamax.config.schema import OptimConfig
from llamax.optim import lr_at


@st.composite
def runs(draw: st.DrawFn) -> tuple[OptimConfig, int]:
    total = draw(st.integers(2, 2000))
    warmup = draw(st.integers(0, total - 1))
    schedule = draw(st.sampled_from(["cosine", "linear", "wsd", "constant"]))
    decay = draw(st.integers(1, total - warmup)) if schedule == "wsd" else 0
    lr = draw(st.floats(1e-6, 1.0))
    low = lr * draw(st.floats(0.0, 1.0))
    return OptimConfig(
        lr=lr, min_lr=low, schedule=schedule, warmup_steps=warmup, decay_steps=decay
    ), total


@given(runs())
def test_bounds_and_endpoints(run: tuple[OptimConfig, int]) -> None:
    optim, total = run
    rates = [lr_at(step, optim, total) for step in range(total + 1)]
    near = optim.lr * 1e-9
    assert all(0 <= rate <= optim.lr + near for rate in rates)
    assert all(rate >= optim.min_lr - near for rate in rates[optim.warmup_steps :])
    assert rates[optim.warmup_steps] == pytest.approx(optim.lr)
    assert rates[0] == (0 if optim.warmup_steps else pytest.approx(optim.lr))
    last = optim.lr if optim.schedule == "constant" else optim.min_lr
    assert rates[-1] == pytest.approx(last, abs=near)
    assert lr_at(total + 7, optim, total) == pytest.approx(last, abs=near)


@given(runs())
def test_no_jumps_and_one_peak(run: tuple[OptimConfig, int]) -> None:
    optim, total = run
    rates = [lr_at(step, optim, total) for step in range(total + 1)]
    warmup, falls = optim.warmup_steps, optim.decay_steps or total - optim.warmup_steps
    near = optim.lr * 1e-9
    for step, (now, then) in enumerate(pairwise(rates)):
        if step < warmup:
            assert then - now == pytest.approx(optim.lr / warmup)
        else:
            assert -1.6 * (optim.lr - optim.min_lr) / falls - near <= then - now <= near


def test_shapes_by_hand() -> None:
    def at(schedule: str, step: int, decay: int = 0) -> float:
        optim = OptimConfig(
            lr=1.0, min_lr=0.2, schedule=schedule, warmup_steps=10, decay_steps=decay
        )
        return lr_at(step, optim, 110)

    assert at("cosine", 5) == at("wsd", 5, 20) == 0.5
    assert at("cosine", 60) == pytest.approx(0.6)
    assert at("cosine", 35) == pytest.approx(0.2 + 0.8 * (1 + 0.5**0.5) / 2)
    assert at("linear", 35) == pytest.approx(0.8)
    assert at("wsd", 90, 20) == 1.0
    assert at("wsd", 100, 20) == pytest.approx(0.6)
    assert at("wsd", 10, 105) == 1.0, "a fall that would begin in warm-up begins after it"
    assert at("constant", 110) == 1.0
