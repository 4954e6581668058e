"""The ids of a sentencepiece BPE model, computed several times faster by tiktoken.

tiktoken merges byte pairs by rank, sentencepiece's BPE merges characters by score; both always
take the best pair, leftmost first.  They agree on every text if

* ranks follow scores, and no two scores are equal.  Runs of spaces may have equal scores, as in
  Mistral's vocabulary, if everything else merges before them: then spaces stay single, and each run
  that remains is looked up at the end;
* bytes first join to characters: every beginning of every character of the vocabulary has a rank
  below all pieces.  A character that the vocabulary lacks becomes the bytes to which sentencepiece
  falls back;
* the text is cut only where no merge could cross: never between two characters that are neighbours
  in some piece.  Such characters are put in one group (union-find), and a segment is a run of
  one group with the spaces before it.  In Llama's vocabulary the groups are the scripts:
  letters, punctuation and Greek never mix, and digits and line breaks stand alone::

      "\\n    return self.x_1"  ->  "\\n", "    return", " self", ".", "x", "_", "1"

* merging a segment that is a piece gives that piece (tiktoken looks it up first).

``Segments.of`` checks each condition and returns None for a model that fails one; the caller then
uses sentencepiece.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import sentencepiece
import tiktoken

from llamax.data.tokenizer.sentencepiece_model import (
    BPE,
    BYTE,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
)

Ids = npt.NDArray[np.uint32]


class Segments:
    """Encodes texts with the ids of a sentencepiece model."""

    @classmethod
    def of(cls, model: SentencePieceModel) -> Segments | None:
        """The encoder of ``model``; None if it could differ from sentencepiece.

        Besides the conditions above it needs: no character rewritten before encoding (identity);
        byte fallback, as unknown characters would fuse across a cut; no pieces that are matched
        before merging (user defined) or split again after it (unused).
        """
        kinds = [kind for _, _, kind in model.pieces]
        pieces = {text: score for text, score, kind in model.pieces if kind == NORMAL}
        if (
            model.kind != BPE
            or model.rewrites
            or model.drops_spaces
            or model.spaces_behind
            or kinds.count(BYTE) != 256
            or not {USER_DEFINED, UNUSED}.isdisjoint(kinds)
            or any(" " in text or re.search("[^▁]▁", text) for text in pieces)
        ):
            return None
        runs = {score for text, score in pieces.items() if re.fullmatch("▁▁+", text)}
        others = [score for text, score in pieces.items() if re.search("[^▁]", text[1:])]
        runs_last = max(runs, default=0.0) < min(others, default=0.0) and not any(
            re.search("▁▁+[^▁]", text) for text in pieces
        )
        counted = others if runs_last else [s for text, s in pieces.items() if len(text) > 1]
        if len(set(counted)) < len(counted):
            return None
        bare = sentencepiece.SentencePieceProcessor(model_proto=model.without_prefix())
        if any(len(ids) > 1 for ids in bare.encode(list(pieces))):
            return None
        return cls(model, bare, runs_last)

    def __init__(
        self, model: SentencePieceModel, bare: sentencepiece.SentencePieceProcessor, runs_last: bool
    ) -> None:
        self._bare, self._prefix = bare, " " if model.dummy_prefix else ""
        numbers = {text: number for number, (text, _, _) in enumerate(model.pieces)}
        pieces = {text: score for text, score, kind in model.pieces if kind == NORMAL}
        # Sentencepiece writes a space as ▁, so both are one character to it; tiktoken sees spaces.
        spelled = {
            text.replace("▁", " ").encode(): numbers[text]
            for text in sorted(pieces, key=lambda text: -pieces[text])
            if not (runs_last and re.fullmatch("▁▁+", text))
        }
        ranks = _ranks(spelled, {character for text in pieces for character in text})
        self._engine = tiktoken.Encoding(
            "segments",
            pat_str=pattern(list(pieces), runs_last),
            mergeable_ranks=ranks,
            special_tokens={},
        )
        # The ids of each token of the engine: a piece, or the bytes of the fallback.
        ids = [
            [spelled[token]] if token in spelled else [numbers[f"<0x{b:02X}>"] for b in token]
            for token in ranks
        ]
        self._end = len(ids)  # the token that ends a text; it has no ids
        self._space = ord(" ") if runs_last else self._end
        self._runs: dict[int, int] = {}  # token of a run of spaces, by its length
        self._ids, self._lengths = np.zeros(0, np.uint32), np.zeros(0, np.int64)
        self._add([*ids, []])

    def _add(self, ids: list[list[int]]) -> None:
        """Append the ids of the next tokens."""
        self._ids = np.concatenate([self._ids, np.array([i for each in ids for i in each], "u4")])
        self._lengths = np.concatenate([self._lengths, [len(each) for each in ids]])
        self._starts = np.cumsum(self._lengths) - self._lengths

    def encode(self, texts: Sequence[str], threads: int = 1, begin: bool = True) -> list[Ids]:
        """The ids of each text; ``begin``: whether texts begin a document, perhaps with a space."""
        prefix = self._prefix if begin else ""
        spaced = [prefix + text.replace("▁", " ") if text else "" for text in texts]
        # Python's integers are freed text by text; numpy's, which stay, take a tenth of the memory.
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                found = list(pool.map(self._tokens, spaced))
        else:
            found = list(map(self._tokens, spaced))
        tokens = np.concatenate([*found, np.zeros(0, np.int32)])
        if self._space != self._end:
            tokens = self._join_runs(tokens)
        lengths = self._lengths[tokens]
        ends = np.cumsum(lengths)
        shift = np.repeat(self._starts[tokens] - ends + lengths, lengths)
        ids = self._ids[shift + np.arange(len(shift))]
        return np.split(ids, ends[tokens == self._end][:-1]) if texts else []

    def _tokens(self, text: str) -> npt.NDArray[np.int32]:
        """The engine's tokens of a text, and the one that ends it."""
        tokens = self._engine.encode_ordinary(text)
        tokens.append(self._end)
        return np.array(tokens, np.int32)

    def _join_runs(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Replace every run of spaces by the token of a run of that length."""
        space = np.concatenate([[False], tokens == self._space, [False]])
        edges = np.flatnonzero(space[1:] != space[:-1])
        starts, stops = edges[::2], edges[1::2]
        sizes, which = np.unique(stops - starts, return_inverse=True)
        for size in sizes.tolist():
            if size not in self._runs:
                self._runs[size] = len(self._lengths)
                self._add([self._bare.encode(" " * size)])
        tokens[starts] = np.array([self._runs[size] for size in sizes.tolist()], np.int32)[which]
        keep = ~space[1:-1]
        keep[starts] = True
        joined: npt.NDArray[np.int32] = tokens[keep]
        return joined


def _ranks(spelled: Iterable[bytes], characters: Iterable[str]) -> dict[bytes, int]:
    """Rank of every token: single bytes, beginnings of characters, then pieces in order."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoded = sorted(character.encode() for character in characters if character != "▁")
    for size in (2, 3, 4):
        for character in encoded:
            if len(character) >= size:
                ranks.setdefault(character[:size], len(ranks))
    for piece in spelled:
        ranks.setdefault(piece, len(ranks))
    return ranks


def pattern(pieces: Sequence[str], runs_last: bool = False) -> str:
    """The regular expression that matches the segments under a vocabulary of ``pieces``.

    With ``runs_last`` only the last of several spaces belongs to the segment after it.
    """
    leader: dict[str, str] = {}

    def lead(character: str) -> str:
        while leader.setdefault(character, character) != character:
            leader[character] = leader[leader[character]]
            character = leader[character]
        return character

    for text in pieces:
        for a, b in pairwise(text):
            if a != "▁":
                leader[lead(a)] = lead(b)
            elif b != "▁":
                lead(b)  # joins a space before it: a group, perhaps of one character
    groups: dict[str, list[str]] = {}
    for character in leader:
        groups.setdefault(lead(character), []).append(character)
    # Groups with most of ASCII first: most text is in them, and matches are tried in order.
    ordered = sorted(groups.values(), key=lambda group: -sum(c.isascii() for c in group))
    runs = [f" {'?' if runs_last else '*'}{_class(group)}+" for group in ordered]
    alone = "[^" + _class([*leader, " "])[1:]
    return "|".join([*runs, alone, " " if runs_last else " +"])


def _class(characters: Sequence[str]) -> str:
    return "[" + "".join(map(re.escape, characters)) + "]"
