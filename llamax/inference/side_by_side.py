"""Two texts in columns of a terminal, side by side."""

from __future__ import annotations

import unicodedata

COLUMN = 48  # characters of a column


def columns(left: str, right: str, width: int = COLUMN) -> str:
    """Two texts side by side, each wrapped at ``width`` columns of a terminal."""
    sides = [list(_wrapped(text, width)) for text in (left, right)]
    rows = max(map(len, sides))
    first, second = ([*side, *[""] * (rows - len(side))] for side in sides)
    lines = zip(first, second, strict=True)
    return "\n".join(f"{a}{' ' * (width - _width(a))} | {b}".rstrip() for a, b in lines)


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for character in text.expandtabs(4):
        if character == "\n":
            lines.append("")
            continue
        if _width(lines[-1] + character) > width:
            lines.append("")
        lines[-1] += character
    return lines


def _width(text: str) -> int:
    """Columns that a text takes in a terminal: Hangul, Kana and Han take two per character."""
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)
