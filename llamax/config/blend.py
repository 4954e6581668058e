"""A blend in ``data.path``: weights, and datasets of any kind, in turn.

::

    0.7 /fsx/web 0.3 /fsx/books_text_document
"""

from __future__ import annotations


def blend_words(path: str) -> list[str]:
    """Weight, dataset, weight, dataset, ... in a path that is a blend; empty for another path."""
    words = path.split()
    return words if len(words) > 1 and weight_of(words[0]) is not None else []


def weight_of(word: str) -> float | None:
    """The weight in a word; 0 if it is not above 0, None if it is not a number."""
    try:
        weight = float(word)
    except ValueError:
        return None
    return weight if 0 < weight < float("inf") else 0.0
