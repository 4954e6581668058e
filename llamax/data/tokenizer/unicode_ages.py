"""Characters that became letters, numbers or marks after Unicode 14, and are still rare.

Engines split text by such classes, each with the tables of its own age: tokenizers 0.20 has those
of Unicode 14, gigatoken 0.10 those of 17.  Beyond the Basic Multilingual Plane whole blocks of
historic scripts, and planes without characters, are taken.

Source: UnicodeData.txt of Unicode 14.0 and 18.0.
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import numpy.typing as npt

RANGES = (
    "\u0295\u0558\u058b\u058c\u05c8\u05c9\u088f\u0897\u0b53\u0b54\u0c5c\u0cdc\u0cf3\u0ece"
    "\u1acf-\u1af0\u1c89\u1c8a\u208f\u209d-\u209f\ua7cb-\ua7cf\ua7d2\ua7d4\ua7da-\ua7dd\ua7e2\ua7f1"
    "\uab6c\uab6d\U00010500-\U0001cfff\U0001d127\U0001d128\U0001d250-\U0001d2df\U0001d6a6"
    "\U0001df00-\U0001efff\U0002b739-\U0002b73f\U0002b81e\U0002cea2-\U0002ceaf"
    "\U0002ebe1-\U0002f7ff\U0002fa1e-\U000e00ff"
)
FIRST = ord(RANGES[0])
PIECE = 2**20  # characters looked at at once


def has_recent(text: str) -> bool:
    """Whether a text holds such a character."""
    pieces = (text[start : start + PIECE] for start in range(0, len(text), PIECE))
    codes = (np.frombuffer(each.encode("utf-32-le", "surrogatepass"), "<u4") for each in pieces)
    # Most characters come before all of them, and comparing is faster than looking up.
    return any(_is_recent()[each[each >= FIRST]].any() for each in codes)


@cache
def _is_recent() -> npt.NDArray[np.bool_]:
    """For each code of Unicode, whether it is one of them."""
    table = np.zeros(0x110000, bool)
    for first, last in re.findall("(.)(?:-(.))?", RANGES):
        table[ord(first) : ord(last or first) + 1] = True
    return table
