"""Texts in columns of a terminal, side by side."""

from __future__ import annotations

import unicodedata

COLUMN = 48  # characters of a column
NO_WIDTH = ("Mn", "Me", "Mc", "Cf")  # marks and format characters, by Unicode's general category


def columns(*texts: str, width: int = COLUMN) -> str:
    """Texts side by side, each wrapped at ``width`` columns of a terminal."""
    sides = [list(_wrapped(text, width)) for text in texts]
    rows = max(map(len, sides))
    filled = [
        [f"{line}{' ' * (width - _width(line))}" for line in (*side, *[""] * (rows - len(side)))]
        for side in sides
    ]
    return "\n".join(" | ".join(line).rstrip() for line in zip(*filled, strict=True))


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
    """Columns that a text takes in a terminal: Hangul, Kana and Han take two per character.

    Marks take none, nor do the vowels and ends of Hangul syllables that are written in parts (NFD).
    """
    return sum(map(_character_width, text))


def _character_width(character: str) -> int:
    if "\u1160" <= character <= "\u11ff" or unicodedata.category(character) in NO_WIDTH:
        return 0
    return 1 + (unicodedata.east_asian_width(character) in "WF")
