"""One quantity of a plan, and the sum of several."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """A quantity in bytes or seconds, and the formula it comes from."""

    name: str
    value: float
    formula: str


def total(lines: Iterable[Line]) -> float:
    """The sum of quantities."""
    return sum(line.value for line in lines)
