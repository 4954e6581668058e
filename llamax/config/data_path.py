"""The words of ``data.path`` that are no file: those of a blend, and random tokens.

::

    0.7 /fsx/web 0.3 /fsx/books_text_document     a blend: weights and datasets in turn
    random                                        tokens that every rank makes itself
"""

from __future__ import annotations

RANDOM = "random"  # a folder of this name is ./random


def blend_words(path: str) -> list[str]:
    """Weight, dataset, weight, dataset, ... in a path that is a blend; empty for another path."""
    words = path.split()
    return words if len(words) > 1 and weight_of(words[0]) is not None else []


def datasets_in(path: str) -> list[str]:
    """The datasets that a path names: those of a blend, or itself."""
    return blend_words(path)[1::2] or [path]


def weight_of(word: str) -> float | None:
    """The weight in a word; 0 if it is not above 0, None if it is not a number."""
    try:
        weight = float(word)
    except ValueError:
        return None
    return weight if 0 < weight < float("inf") else 0.0
