"""Charts: ticks, outliers, smoothing."""

from __future__ import annotations

import pytest

from llamax.tools.monitor.svg import Curve, chart, smoothed, thinned, ticks, value_range


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(1.93, 2.11) == pytest.approx([1.95, 2.0, 2.05, 2.1])
    assert ticks(0, 2.5e9)[1] == 5e8


def test_charts_leave_out_what_is_not_finite_and_the_wildest() -> None:
    assert chart("t", [Curve("c", [])], "x", str, str) == ""
    assert chart("t", [Curve("c", [(1, float("inf"))])], "x", str, str) == ""
    values = [*([1.0] * 198), 500.0, 900.0]
    low, high = value_range(values, zero=False)
    assert high < 600
    assert value_range([2.0, 4.0], zero=True)[0] == 0.0
    assert low < 1.0 < high


def test_curves_are_thinned_and_smoothed_without_bias() -> None:
    line = [(float(x), 3.0) for x in range(2000)]
    assert len(thinned(line)) == 400
    assert thinned(line)[-1] == (1999.0, 3.0)
    assert [y for _, y in smoothed(line[:50])] == pytest.approx([3.0] * 50)
