"""Samples as text for a terminal, or in marks where there are no colours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llamax.runtime.text import printable, printable_line
from llamax.runtime.units import count
from llamax.tools.inspect.samples import Part, Piece, Shown

LEARNT, SPECIAL, FAINT = "32;1", "36", "2"  # bold green, cyan, faint
MARKS = ("⟦", "⟧")
ASCII_MARKS = ("[[", "]]")


def show_samples(
    samples: Sequence[Shown], colour: bool = False, marks: tuple[str, str] = MARKS
) -> str:
    """Samples as text; what is learnt is in colour, or between ``marks``.

    Control characters of the texts are escapes.
    """
    lines = [_legend(colour, marks)]
    for shown in samples:
        parts = count(len(shown.parts), "document")
        lines += [
            "",
            f"sample {shown.number + 1:,} of {shown.total:,} in {printable_line(shown.file)}, "
            f"{shown.how}: {parts}, {count(shown.tokens, 'token')}, {shown.learnt:,} learnt",
        ]
        for part in shown.parts:
            lines.append(_painted(f"-- {_place(part)}", FAINT, colour))
            lines.append("".join(_text(part.pieces, colour, marks)))
    return "\n".join(lines)


def _legend(colour: bool, marks: tuple[str, str]) -> str:
    if colour:
        special = _painted("special token", SPECIAL, True)
        return f"{_painted('learnt', LEARNT, True)}, not learnt, {special}"
    return f"{marks[0]}learnt{marks[1]}, not learnt"


def _place(part: Part) -> str:
    """Which document a part is, and what of it."""
    text = f"document {part.document:,}"
    if part.start:
        text += f", from its token {part.start + 1:,}"
    if part.missing:
        text += f", cut {count(part.missing, 'token')} before its end"
    return text


def _text(pieces: Sequence[Piece], colour: bool, marks: tuple[str, str]) -> Iterator[str]:
    inside = False
    for piece in pieces:
        if not colour and piece.learnt != inside:
            yield marks[0] if piece.learnt else marks[1]
            inside = piece.learnt
        text = printable(piece.text)
        codes = [LEARNT] * piece.learnt + [SPECIAL] * piece.special
        yield _painted(text, ";".join(codes), colour)
    if inside:
        yield marks[1]


def _painted(text: str, codes: str, colour: bool) -> str:
    """Text in colour, line by line, so that a pager shows each right."""
    if not colour or not codes:
        return text
    return "\n".join(f"\x1b[{codes}m{line}\x1b[0m" if line else "" for line in text.split("\n"))
