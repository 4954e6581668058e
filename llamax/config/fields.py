"""What is said of a configuration field beside its type: help, unit, and the range it lives in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Range(NamedTuple):
    """The numbers a field may hold, in words and as a test."""

    words: str
    holds: Callable[[float], bool]


COUNT = Range("1 or more", lambda x: 1 <= x < math.inf)
NATURAL = Range("0 or more", lambda x: 0 <= x < math.inf)
POSITIVE = Range("a number above 0", lambda x: 0 < x < math.inf)
FRACTION = Range("0 or more and below 1", lambda x: 0 <= x < 1)


def about(help: str, unit: str = "", range: Range | None = None) -> dict[str, Any]:
    """The metadata of a field."""
    return {"help": help, "unit": unit, "range": range}
