"""Line charts as inline SVG, without a library or a script.

A chart has one or several curves over one axis, a few ticks at round numbers, and for noisy values
a smoothed line above faint raw ones.  Colours are CSS variables of the page (``--c0``, ...), so a
page can be dark or light.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llamax.tools.monitor.columns import Numbers
from llamax.tools.monitor.live_log import LARGEST

WIDTH, HEIGHT = 520, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 34
POINTS = 400  # drawn for each curve
COLOURS = 8
Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """Values over an axis; ``marked``: with a dot for each value; ``smooth``: smoothed."""

    name: str
    points: npt.ArrayLike  # [n, 2]
    colour: int = 0
    marked: bool = False
    smooth: bool = False


class FiniteCurve(NamedTuple):
    """A curve with points [n, 2] that are all finite."""

    name: str
    points: Numbers
    colour: int
    marked: bool
    smooth: bool


def chart(
    title: str,
    curves: Sequence[Curve],
    x_name: str,
    show_x: Callable[[float], str],
    show_y: Callable[[float], str],
    zero: bool = False,
) -> str:
    """A figure of the curves that have points; empty where none has.

    ``show_x``, ``show_y``: the text of a value.  ``zero``: the y axis begins at 0; otherwise it
    leaves out the most extreme hundredth of the values.
    """
    finite = [one for curve in curves if len((one := _finite(curve)).points)]
    if not finite:
        return ""
    xs = np.concatenate([curve.points[:, 0] for curve in finite])
    low, high = value_range(np.concatenate([curve.points[:, 1] for curve in finite]), zero)
    left, right = float(xs.min()), max(float(xs.max()), float(xs.min()) + 1e-9)

    def place(point: Point) -> str:
        x = LEFT + (point[0] - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        y = min(max(point[1], low), high)
        return f"{x:.1f},{TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = [*_grid(low, high, show_y, place, left, right), *_axis(left, right, show_x, x_name)]
    for curve in finite:
        parts += _draw(curve, place, show_x, show_y)
    label = escape(f"{title} over {x_name}", quote=True)
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _finite(curve: Curve) -> FiniteCurve:
    points = np.asarray(curve.points, np.float64).reshape(-1, 2)
    finite = points[(np.abs(points) < LARGEST).all(1)]
    return FiniteCurve(curve.name, finite, curve.colour, curve.marked, curve.smooth)


def value_range(values: npt.ArrayLike, zero: bool) -> Point:
    """The range of a y axis: all but the most extreme hundredth at either end, with a margin."""
    ordered = np.sort(np.asarray(values, np.float64))
    cut = len(ordered) // 100
    low, high = float(ordered[cut]), float(ordered[-1 - cut])
    low = 0.0 if zero else low
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low if zero else low - margin), high + margin


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers in a range, 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step for step in (1, 2, 5, 10) if raw <= step * power) * power
    first = math.ceil(low / step - 1e-9)
    return [step * k for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _grid(
    low: float,
    high: float,
    show: Callable[[float], str],
    place: Callable[[Point], str],
    left: float,
    right: float,
) -> list[str]:
    found = []
    for value in ticks(low, high):
        y = place((left, value)).partition(",")[2]
        found.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
            f'<text class="tick" x="{LEFT - 7}" y="{y}" dy="0.32em" text-anchor="end">'
            f"{escape(show(value))}</text>"
        )
    return found


def _axis(left: float, right: float, show: Callable[[float], str], name: str) -> list[str]:
    found = []
    for value in ticks(left, right):
        x = LEFT + (value - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        found.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 18}" text-anchor="middle">'
            f"{escape(show(value))}</text>"
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    found.append(
        f'<text class="tick name" x="{middle:.0f}" y="{HEIGHT - 3}" text-anchor="middle">'
        f"{escape(name)}</text>"
    )
    return found


def _draw(
    curve: FiniteCurve,
    place: Callable[[Point], str],
    show_x: Callable[[float], str],
    show_y: Callable[[float], str],
) -> list[str]:
    points = thinned(curve.points)
    style = f'style="stroke:var(--c{curve.colour % COLOURS})"'
    found = []
    if curve.smooth and len(points) > 20:
        faint = " ".join(map(place, points))
        found.append(f'<polyline class="raw" {style} points="{faint}"/>')
        points = smoothed(points)
    line = " ".join(map(place, points))
    last_x, last_y = curve.points[-1].tolist()
    title = escape(f"{curve.name}: {show_y(last_y)} at {show_x(last_x)}")
    found.append(
        f'<polyline class="line" {style} points="{line}"><title>{title}</title></polyline>'
    )
    for point in points if curve.marked or len(points) == 1 else ():
        x, y = place(point).split(",")
        title = escape(f"{curve.name}: {show_y(point[1])} at {show_x(point[0])}")
        found.append(
            f'<circle cx="{x}" cy="{y}" r="2.6" style="fill:var(--c{curve.colour % COLOURS})">'
            f"<title>{title}</title></circle>"
        )
    return found


def thinned(points: npt.ArrayLike) -> list[Point]:
    """At most ``POINTS`` of the points [n, 2], each the mean of consecutive ones."""
    points = np.asarray(points, np.float64)
    if len(points) <= POINTS:
        return [(x, y) for x, y in points.tolist()]
    edges = np.arange(POINTS + 1) * len(points) // POINTS
    means = np.add.reduceat(points[:, 1], edges[:-1]) / np.diff(edges)
    return [*zip(points[edges[1:] - 1, 0].tolist(), means.tolist(), strict=True)]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """An exponential mean over a hundredth of the curve, without a bias at its start."""
    keep = 1 - 100 / max(len(points), 200)
    total = weight = 0.0
    found = []
    for x, y in points:
        total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        found.append((x, total / weight))
    return found
