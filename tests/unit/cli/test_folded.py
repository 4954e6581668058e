"""Lines that fit a terminal, and stay whole in a file or pipe."""

from __future__ import annotations

import sys

import pytest

from llamax.cli.inspect import LABEL
from llamax.cli.options import folded

LINES = [
    "model       Llama of 29.8K parameters: 1 layer, hidden 32, feed-forward 64, heads 8/4",
    f"tokenizer   {'57' * 40}",
    "  plain lines go on four columns to the right of where they start, whatever they say",
    "",
]


def test_lines_are_folded_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    assert [*folded(LINES, LABEL)] == [
        "model       Llama of 29.8K parameters: 1 layer, hidden 32,",
        "            feed-forward 64, heads 8/4",
        f"tokenizer   {'57' * 40}",
        "  plain lines go on four columns to the right of where they",
        "      start, whatever they say",
        "",
    ]


def test_lines_stay_whole_elsewhere() -> None:
    assert [*folded(LINES, LABEL)] == LINES
