"""Gradient clipping: the norm and the factor."""

from __future__ import annotations

import pytest
import torch

from llamax.optim.clip import clip_factor, sum_of_squares


@pytest.mark.parametrize(("max_norm", "kept"), [(0.0, 1.0), (10.0, 1.0), (1.0, 0.2), (0.5, 0.1)])
def test_clip_factor_honours_the_limit(max_norm: float, kept: float) -> None:
    assert float(clip_factor(torch.tensor(5.0), max_norm)) == pytest.approx(kept, rel=1e-6)


def test_sum_of_squares_keeps_seven_digits() -> None:
    x = torch.rand(9_000_001, generator=torch.Generator().manual_seed(0))
    want = float(x.double().square().sum())
    assert float(sum_of_squares([x[:5], x[5:]])) == pytest.approx(want, rel=3e-7)
    assert float(sum_of_squares([x[:5]])) == pytest.approx(float(x[:5].square().sum()))
    assert float(sum_of_squares([x[:0]])) == 0
