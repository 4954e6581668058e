"""Samples as token ids, with a mark on each token that counts in the loss."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llamax.data.chat.templates import SHIELD, Span, Template, make_sample
from llamax.data.tokenizer.tokenizer import Tokenizer

Ids = npt.NDArray[np.uint32]
Bits = npt.NDArray[np.bool_]


class Tokens(NamedTuple):
    """Token ids of a sample or a prompt, and whether each counts in the loss."""

    ids: Ids
    counted: Bits


# ---- from spans to tokens


class Encoder:
    """Encodes the spans of a template.

    ``bos`` and ``eos``: whether samples begin and end with them, if the tokenizer has them.
    """

    def __init__(self, tokenizer: Tokenizer, bos: bool = True, eos: bool = True) -> None:
        self.tokenizer = tokenizer
        self.bos = tokenizer.bos_id if bos else None
        self.eos = tokenizer.eos_id if eos else None

    @cached_property
    def names(self) -> dict[int, str]:
        """The names of special tokens by id."""
        return {number: name for name, number in self.tokenizer.special.items()}

    def template(self, name: str, source: str) -> Template:
        """A template that knows this tokenizer's special tokens."""
        named = (("bos_token", self.tokenizer.bos_id), ("eos_token", self.tokenizer.eos_id))
        tokens = {key: self.names.get(i, "") for key, i in named if i is not None}
        return Template(name, source, tuple(self.tokenizer.special), self.tokenizer.named | tokens)

    def turn_ends(self, template: Template) -> list[int]:
        """The special tokens with which a template ends an answer."""
        (tokens,) = self.encode([template.spans(make_sample("Q", answer="A"))])
        ends = (int(i) for i in tokens.ids[tokens.counted])
        return list(dict.fromkeys(i for i in ends if i in self.names))

    def encode(self, samples: Sequence[Sequence[Span]], prompts: bool = False) -> list[Tokens]:
        """The tokens of each sample; ``prompts`` have no EOS at their end."""
        pieces = [list(self._pieces(spans)) for spans in samples]
        texts: dict[bool, list[str]] = {False: [], True: []}
        for piece in chain.from_iterable(pieces):
            if not isinstance(piece, Special):
                beginnings = [piece.text[:cut] for cut in piece.cuts]
                texts[piece.after_special] += [piece.text, *beginnings]
        encoded = {
            False: iter(self.tokenizer.encode_documents(texts[False]) if texts[False] else ()),
            True: iter(self.tokenizer.encode_after(texts[True]) if texts[True] else ()),
        }
        return [self._join(sample, encoded, prompts) for sample in pieces]

    def _pieces(self, spans: Sequence[Span]) -> Iterator[Special | Piece]:
        """Special tokens, and the texts between them with the places where answers begin or end."""
        whole = "".join(span.text for span in spans)
        edges, at = [], 0
        for span in spans:
            edges.append((at, span.answer))
            at += len(span.text)
        after_special = False
        for start, stop, token in self._split(whole):
            inside = [(max(at, start), answer) for at, answer in edges if at < stop]
            begun = max(i for i, (at, _) in enumerate(inside) if at <= start)
            if token is not None:
                yield Special(token, inside[begun][1])
                at_begin = token == self.tokenizer.bos_id and self.tokenizer.space_after_bos
                after_special = not at_begin
                continue
            kept = inside[begun:]
            text = whole[start:stop]
            cuts = [len(_unshielded(whole[start:at])) for at, _ in kept[1:]]
            yield Piece(_unshielded(text), cuts, [answer for _, answer in kept], after_special)

    def _split(self, text: str) -> Iterator[tuple[int, int, int | None]]:
        """(start, stop, id) of special tokens and (start, stop, None) of the texts between."""
        at = 0
        for match in self._special.finditer(text) if self.tokenizer.special else ():
            name, start = match[match.lastgroup or 0], match.start()
            if self.tokenizer.strips.get(name, (False, False))[0]:
                # A pattern that begins with white space would take time in the square of its runs.
                start = at + len(text[at:start].rstrip())
            if start > at:
                yield at, start, None
            yield start, match.end(), self.tokenizer.special[name]
            at = match.end()
        if at < len(text):
            yield at, len(text), None

    @cached_property
    def _special(self) -> Any:
        names = sorted(self.tokenizer.special, key=len, reverse=True)
        return re.compile("|".join(self._pattern(i, name) for i, name in enumerate(names)))

    def _pattern(self, number: int, name: str) -> str:
        """The pattern of a special token, with the white space that it takes behind it."""
        if not self.tokenizer.strips.get(name, (False, False))[1]:
            return re.escape(name)
        return rf"(?P<name{number}>{re.escape(name)})\s*"

    def _join(
        self, pieces: list[Special | Piece], encoded: Mapping[bool, Iterator[Any]], prompt: bool
    ) -> Tokens:
        ids: list[Ids] = []
        counted: list[Bits] = []

        def add_one(token: int, answer: bool) -> None:
            ids.append(np.array([token], np.uint32))
            counted.append(np.array([answer]))

        first, answer = pieces[0], False
        if self.bos is not None and not (isinstance(first, Special) and first.id == self.bos):
            add_one(self.bos, False)
        for piece in pieces:
            if isinstance(piece, Special):
                add_one(piece.id, piece.answer)
                answer = piece.answer
                continue
            whole = next(encoded[piece.after_special])
            marks = np.zeros(len(whole), bool)
            at = 0
            for cut, now in zip([None, *piece.cuts], piece.answers, strict=True):
                if cut is not None:
                    at = self._within(whole, next(encoded[piece.after_special]), piece.text[:cut])
                marks[at:] = answer = now
            ids.append(whole)
            counted.append(marks)
        ended = next(
            (p for p in reversed(pieces) if isinstance(p, Special) or p.text.strip()), first
        )
        if self.eos is not None and not prompt and not isinstance(ended, Special):
            add_one(self.eos, answer)
        return Tokens(np.concatenate(ids), np.concatenate(counted))

    def _within(self, whole: Ids, beginning: Ids, text: str) -> int:
        """The number of tokens of ``whole`` that lie in its beginning ``text``.

        ``beginning`` are the tokens of ``text`` alone.  Where the two differ (two line breaks may
        be one token only at the end of a text), tokens count that decode to a part of ``text``.
        """
        at = _shared(whole, beginning)
        if at < len(beginning):
            for longer in range(at + 1, min(len(whole), len(text.encode()) + 2) + 1):
                if text.startswith(self.tokenizer.decode(whole[:longer].tolist())):
                    at = longer
        return at


class Special(NamedTuple):
    """A special token of the template."""

    id: int
    answer: bool


class Piece(NamedTuple):
    """A text, and the characters at which an answer begins or ends in it."""

    text: str
    cuts: list[int]
    answers: list[bool]  # before the first cut, then after each
    after_special: bool  # follows a special token and does not begin the document


def _unshielded(text: str) -> str:
    return text.replace(SHIELD, "")


def _shared(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> int:
    """The number of tokens that two texts have in common at their beginnings."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
