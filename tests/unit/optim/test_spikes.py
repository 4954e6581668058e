"""Outliers against a rolling window: the same decisions as NumPy in float64, and what is saved."""

from __future__ import annotations

import json
import math
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

from llamax.config.schema import OptimConfig
from llamax.optim.spikes import LARGEST, SpikeFilter
from llamax.runtime.errors import CheckpointError

WINDOW = 20


def settings(chosen: Any = "both", window: int = WINDOW, sigma: float = 3.0) -> OptimConfig:
    return OptimConfig(skip_spikes=chosen, spike_window=window, spike_sigma=sigma)


def numbers() -> np.ndarray:
    """Losses and norms of a run [steps,2]: falling, noisy, with spikes, zeros and no numbers."""
    random, steps = np.random.default_rng(0), 120
    values = random.lognormal(0.0, 0.2, (steps, 2)) + np.linspace(3.0, 1.0, steps)[:, None]
    for step in (4, 25, 26, 27, 60, 61, 90):
        values[step, step % 2] *= 4.0
    values[70, 0], values[71, 1], values[72] = math.nan, math.inf, (-math.inf, math.nan)
    values[80] = 0.0
    return values.astype(np.float32)


def reference(values: np.ndarray, chosen: str) -> tuple[list[list[float]], list[bool]]:
    """The bounds before each step, and whether it is accepted."""
    windows = [deque[float](maxlen=WINDOW), deque[float](maxlen=WINDOW)]
    bounds, accepted = [], []
    for pair in values.tolist():
        limits = [math.inf, math.inf]
        for place, name in enumerate(("loss", "norm")):
            if chosen in (name, "both") and len(windows[place]) >= WINDOW // 2:
                limits[place] = float(np.mean(windows[place]) + 3 * np.std(windows[place], ddof=1))
        fine = all(map(math.isfinite, pair))
        fine = fine and all(value <= limit for value, limit in zip(pair, limits, strict=True))
        bounds.append(limits)
        accepted.append(fine)
        for window, value in zip(windows, pair, strict=True):
            if fine:
                window.append(value)
    return bounds, accepted


def take(spikes: SpikeFilter, pair: np.ndarray) -> tuple[list[float], bool]:
    """Let a step pass: its bounds, and whether it was accepted."""
    bounds = spikes.bounds()
    loss, norm = torch.from_numpy(pair)
    accepted = bool(spikes.accepts([*bounds], loss, norm))
    spikes.add([*bounds], loss, norm)
    return bounds.tolist(), accepted


@pytest.mark.parametrize("chosen", ["loss", "norm", "both"])
def test_decisions_are_those_of_numpy(chosen: str) -> None:
    values, spikes = numbers(), SpikeFilter(settings(chosen))
    expected_bounds, expected = reference(values, chosen)
    found = [take(spikes, pair) for pair in values]
    assert [accepted for _, accepted in found] == expected
    assert 3 < expected.count(False) < 20
    bounds = np.array([bound for bound, _ in found])
    bounds[bounds == LARGEST] = math.inf
    np.testing.assert_allclose(bounds, np.array(expected_bounds), rtol=2e-6)
    assert spikes.skipped == expected.count(False)


def test_equal_values_are_no_outliers() -> None:
    spikes = SpikeFilter(settings(sigma=1e-3))
    pair = np.array([0.1, 1e-30], np.float32)  # whose sums round
    assert all(take(spikes, pair)[1] for _ in range(3 * WINDOW))
    assert not take(spikes, np.nextafter(pair, np.float32(1.0)))[1]


def test_very_large_values_hide_no_infinity() -> None:
    spikes = SpikeFilter(settings())
    for value in [1e18, 1e19, 3e37] * WINDOW:
        take(spikes, np.array([value, value], np.float32))
    for loss, norm in ((math.inf, 1.0), (1.0, math.inf), (math.nan, 1.0)):
        assert not take(spikes, np.array([loss, norm], np.float32))[1]


@pytest.mark.parametrize("stop", [0, 7, 26, 27, 75, 119])
def test_a_saved_window_goes_on_to_the_bit(stop: int) -> None:
    values, whole, first = numbers(), SpikeFilter(settings()), SpikeFilter(settings())
    for pair in values[:stop]:
        take(whole, pair)
        take(first, pair)
    resumed = SpikeFilter(settings())
    resumed.load(json.loads(json.dumps(first.state())))
    for pair in values[stop:]:
        assert take(resumed, pair) == take(whole, pair)
    assert resumed.window.equal(whole.window)
    assert resumed.skipped.equal(whole.skipped)


def test_a_window_of_another_length_takes_the_newest() -> None:
    long, short = SpikeFilter(settings()), SpikeFilter(settings(window=16))
    for pair in numbers()[:40]:
        take(long, pair)
    short.load(long.state())
    assert short.window.equal(long.window[:, -16:])
    again = SpikeFilter(settings())
    again.load(short.state())
    assert again.window[:, -16:].equal(short.window)
    assert again.window[2].sum() == 16
    again.load({})  # of a run that skipped no outliers
    assert again.window[2].sum() == 16


@pytest.mark.parametrize(
    "change",
    [
        {"losses": None},
        {"losses": [1.0]},
        {"losses": ["a", "b"]},
        {"losses": [1.0, math.nan]},
        {"norms": [[1.0], [1.0]]},
        {"skipped": -1},
        {"skipped": 1.5},
        {"skipped": True},
        {"skipped": 10**20},
        {"skipped": 2**24},
        None,
    ],
)
def test_a_damaged_window_is_one_line(change: dict[str, Any] | None) -> None:
    sound = {"losses": [1.0, 2.0], "norms": [1.0, 2.0], "skipped": 0}
    state = {"spikes": None if change is None else sound | change}
    with pytest.raises(
        CheckpointError, match=r"the checkpoint to resume has spikes=.*, which is no"
    ):
        SpikeFilter(settings()).load(state)
    SpikeFilter(settings()).load({"spikes": sound})
