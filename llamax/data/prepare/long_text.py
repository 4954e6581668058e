"""A text file that is too long to be held, read in pieces as often as it is needed.

::

    once     its characters are counted, and its bytes hashed for the choice of the split
    twice    the end that is held out, of an only text, is found at a line break or a space
    last     pieces go to the tokenizer

Shorter texts are strings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from llamax.data.prepare.file_kinds import decode, decoded, reading

LONG_BYTES = 2**20  # a text of more is read in pieces
PIECE = 2**18  # characters of a string that are encoded at once


@dataclass(frozen=True)
class LongText:
    """Characters start:stop of a text file; ``stop`` None: to its end."""

    path: str
    start: int = 0
    stop: int | None = None

    def pieces(self) -> Iterator[str]:
        """The text in pieces; DataError for a file that cannot be read or is not UTF-8."""
        at = 0
        with reading(self.path) as file:
            for text in decoded(file, self.path):
                low, high = self.start - at, len(text) if self.stop is None else self.stop - at
                at += len(text)
                if high <= 0:
                    return
                if piece := text[max(low, 0) : high]:
                    yield piece


Text = str | LongText


def read_text(path: str) -> Text:
    """The text of a file, which is not held if it is long; DataError if it cannot be read."""
    with reading(path) as file:
        raw = file.read(LONG_BYTES + 1)
    return LongText(path) if len(raw) > LONG_BYTES else decode(raw, path, 0)


def pieces_of(text: Text) -> Iterator[str]:
    """A text in pieces."""
    if isinstance(text, LongText):
        yield from text.pieces()
    else:
        yield from (text[at : at + PIECE] for at in range(0, len(text), PIECE))


def without_end(text: Text, share: float, least: int) -> tuple[Text, ...]:
    """A whole text without about ``share`` of it at the end, and that end.

    The end begins after the last line break before it, else after the last space.  Only the text
    where the end would have fewer than ``least`` characters.
    """
    length = sum(map(len, pieces_of(text)))
    held = round(length * share)
    if held < least:
        return (text,)
    cut, low, at = length - held, max(0, length - 2 * held), 0
    places = {"\n": -1, " ": -1}
    for piece in pieces_of(text):
        for mark in places:
            if (place := piece.rfind(mark, max(0, low - at), max(0, cut - at))) >= 0:
                places[mark] = at + place
        at += len(piece)
        if at >= cut:
            break
    place = next((place + 1 for place in places.values() if place >= 0), cut)
    if isinstance(text, str):
        return text[:place], text[place:]
    return replace(text, stop=place), replace(text, start=place)


def lines_of(text: Text) -> Iterator[str]:
    """A text in pieces of whole lines; of a line longer than a piece only the beginning."""
    held, skipping = "", False
    for piece in pieces_of(text):
        held += piece
        end = held.rfind("\n") + 1
        if end and not skipping:
            yield held[:end]
        elif end:  # the rest of a long line, then whole lines
            first = held.find("\n") + 1
            yield held[first:end]
            skipping = False
        held = held[end:]
        if len(held) > PIECE:
            if not skipping:
                yield held
            held, skipping = "", True
    if held and not skipping:
        yield held


def digest(text: Text) -> bytes:
    """Eight bytes of blake2b of a text, which decide its split."""
    found = hashlib.blake2b(digest_size=8)
    for piece in pieces_of(text):
        found.update(piece.encode())
    return found.digest()
