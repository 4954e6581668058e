"""One quantity of a plan."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """A quantity in bytes or seconds, and the formula it comes from."""

    name: str
    value: float
    formula: str
