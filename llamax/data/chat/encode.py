"""Samples as token ids, with a mark on each token that counts in the loss."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from itertools import accumulate, chain, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from llamax.data.chat.templates import SHIELD, Span, Template, make_sample
from llamax.data.tokenizer.cuts import Ids
from llamax.data.tokenizer.tokenizer import Tokenizer

Bits = npt.NDArray[np.bool_]
# Where a text stands: at the beginning of a document, after a special token, or after a cut.
Place = Literal["whole", "inside", "rest"]


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
        pieces = [self._pieces(spans) for spans in samples]
        texts: dict[Place, list[str]] = {"whole": [], "inside": [], "rest": []}
        for piece in chain.from_iterable(pieces):
            if isinstance(piece, Piece):
                beginnings = [piece.text[:cut] for cut in piece.cuts]
                texts[piece.place] += [piece.text, *beginnings]
        whole, inside = texts["whole"], texts["inside"]  # without one no engine is loaded for it
        encoded: dict[Place, Iterator[Ids]] = {
            "whole": iter(self.tokenizer.encode_documents(whole) if whole else ()),
            "inside": iter(self.tokenizer.encode_after(inside) if inside else ()),
            "rest": map(self.tokenizer.encode_rest, texts["rest"]),
        }
        return joined([self._runs(sample, encoded, prompts) for sample in pieces])

    def _pieces(self, spans: Sequence[Span]) -> list[Special | Piece]:
        """Special tokens, and the texts between them with the places where answers begin or end.

        Where the tokenizer allows a cut at such a place, a new piece begins there.
        """
        found: list[Special | Piece] = []
        whole, cuttable = "".join([span.text for span in spans]), self.tokenizer.cuts
        edges = [*accumulate([len(span.text) for span in spans], initial=0)]  # where spans begin
        place: Place = "whole"
        number = 0  # of the span in which a piece begins
        for start, stop, token in self._split(whole):
            while number + 1 < len(spans) and edges[number + 1] <= start:
                number += 1
            answer = spans[number].answer
            if token is not None:
                found.append(Special(token, answer))
                at_begin = token == self.tokenizer.bos_id and self.tokenizer.space_after_bos
                place = "whole" if at_begin else "inside"
                continue
            text, begin = _unshielded(whole[start:stop]), 0
            cuts: list[int] = []
            answers = [answer]
            while number + 1 < len(spans) and edges[number + 1] < stop:
                number += 1
                cut, answer = len(_unshielded(whole[start : edges[number]])), spans[number].answer
                if cuttable and cuttable.match(text, cut):
                    found.append(Piece(text[begin:cut], cuts, answers, place))
                    begin, cuts, answers, place = cut, [], [answer], "rest"
                else:
                    cuts.append(cut - begin)
                    answers.append(answer)
            found.append(Piece(text[begin:], cuts, answers, place))
        return found

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

    def _runs(
        self, pieces: list[Special | Piece], encoded: Mapping[Place, Iterator[Ids]], prompt: bool
    ) -> list[tuple[Ids, bool]]:
        """The tokens of a sample in runs, and whether each run is part of an answer."""
        runs: list[tuple[Ids, bool]] = []
        first, last, answer = pieces[0], pieces[0], False
        if self.bos is not None and not (isinstance(first, Special) and first.id == self.bos):
            runs.append((_only(self.bos), False))
        for piece in pieces:
            if isinstance(piece, Special):
                last, answer = piece, piece.answer
                runs.append((_only(piece.id), answer))
                continue
            ids, at, answer = next(encoded[piece.place]), 0, piece.answers[0]
            for cut, now in zip(piece.cuts, piece.answers[1:], strict=True):
                begin = at
                at = max(at, self._within(ids, next(encoded[piece.place]), piece.text[:cut]))
                runs.append((ids[begin:at], answer))
                answer = now
            runs.append((ids[at:] if at else ids, answer))
            if piece.text and not piece.text.isspace():
                last = piece
        if self.eos is not None and not prompt and not isinstance(last, Special):
            runs.append((_only(self.eos), answer))
        return runs

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
    place: Place


def joined(samples: Sequence[Sequence[tuple[Ids, bool]]]) -> list[Tokens]:
    """The tokens of samples that are given in runs."""
    runs = list(chain.from_iterable(samples))
    if not runs:
        return []
    lengths = [len(ids) for ids, _ in runs]
    ids = np.concatenate([ids for ids, _ in runs])
    counted = np.repeat([answer for _, answer in runs], lengths)
    ends = np.cumsum([0, *lengths])[np.cumsum([0, *map(len, samples)])].tolist()
    return [Tokens(ids[a:b], counted[a:b]) for a, b in pairwise(ends)]


@cache
def _only(token: int) -> Ids:
    """The ids of one token."""
    return np.array([token], np.uint32)


def _unshielded(text: str) -> str:
    return text.replace(SHIELD, "")


def _shared(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> int:
    """The number of tokens that two texts have in common at their beginnings."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
