"""Long texts, encoded in pieces with the ids of the whole text.

A text may be cut where no engine looks across: no segment of the tokenizer's pattern, no merge, no
added token and no rewriting spans the place::

    "the cat   sat"     cut before a space that follows a letter:  "the cat" | "   sat"

Before a space is such a place in byte-level BPE (a segment has a space only in front, or holds
nothing but spaces) and in sentencepiece BPE if no piece has a space inside.  After a line break is
one where the pattern ends a segment with every line break in a row, as Llama 3's does.  What
follows a cut is encoded as the middle of a text: no space is put before it.

Tokenizers without such places (unigram models, whose scores add up along the text; unknown
patterns; models that rewrite text) encode a text whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from llamax.data.tokenizer.llama3 import LLAMA3_PATTERN
from llamax.data.tokenizer.sentencepiece_model import (
    BPE,
    BYTE,
    CONTROL,
    UNKNOWN,
    SentencePieceModel,
)
from llamax.runtime.errors import DataError
from llamax.runtime.units import show_bytes

Ids = npt.NDArray[np.uint32]

PIECE = 2**18  # characters encoded at once
ALLOWED_BYTES = 8  # of memory for each byte of the longest document

SPACE = r"(?<=\S)(?= )"
LINE = r"(?<=\n)(?=\S)"
BLANK = r"(?<=\S)(?=[ \n])"

# Where texts can be cut under known patterns: those of GPT-2, of Llama 3 and Qwen 2, which end a
# segment with all line breaks in a row, and of Mistral Nemo, in which a slash may follow them.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    GPT2_PATTERN: BLANK,
    LLAMA3_PATTERN: f"{SPACE}|{LINE}",
    QWEN2_PATTERN: f"{SPACE}|{LINE}",
    TEKKEN_PATTERN: SPACE,
}


class Encoder(Protocol):
    """The part of a tokenizer that this module uses."""

    memory: int

    @property
    def cuts(self) -> re.Pattern[str] | None: ...

    def encode_rest(self, text: str) -> Ids:
        """The ids of a text that follows a cut."""

    def encode_documents(self, texts: Sequence[str]) -> list[Ids]: ...


class Piece(NamedTuple):
    """The ids of a piece of a text, its bytes of text, and whether the text ends with it."""

    ids: Ids
    text_bytes: int
    last: bool


def encode_in_pieces(
    tokenizer: Encoder, texts: Iterable[str], max_document: int
) -> Iterator[Piece]:
    """Encode the text that ``texts`` are end to end; the ids, joined, are those of the whole text.

    Raises DataError where more than ``longest(tokenizer, max_document)`` bytes have no place to
    cut.
    """
    most, parts, size = longest(tokenizer, max_document), [""], 0
    begun = False

    def encode(text: str, last: bool) -> Piece:
        if begun:
            ids = tokenizer.encode_rest(text)
        else:
            ids = tokenizer.encode_documents([text])[0] if text else np.array([], np.uint32)
        return Piece(ids, len(text.encode()), last)

    for text in texts:
        before = parts[-1][-1:]
        parts.append(text)
        size += len(text.encode())
        if size < PIECE:
            continue
        if (place := last_cut(tokenizer.cuts, before + text) - len(before)) >= 0:
            yield encode("".join(parts[:-1]) + text[:place], False)
            parts, begun = [text[place:]], True
            size = len(parts[0].encode())
        elif size > most:
            raise DataError(
                f"holds more than {show_bytes(most)} without a place where this tokenizer allows "
                "a cut, such as a space; split the document, or use a larger `max_document` than "
                f"{show_bytes(max_document)}"
            )
    yield encode("".join(parts), True)


def longest(tokenizer: Encoder, max_document: int) -> int:
    """The bytes of text that may be encoded whole within ALLOWED_BYTES of memory for each."""
    return max(PIECE, ALLOWED_BYTES * max_document // tokenizer.memory)


def last_cut(cuts: re.Pattern[str] | None, text: str) -> int:
    """The last place where a text can be cut; -1 if there is none."""
    if cuts is None:
        return -1
    start, size = len(text), 2**10
    while start:
        end, start = start, max(0, len(text) - size)
        if places := [
            match.start() for match in cuts.finditer(text, start) if match.start() <= end
        ]:
            return places[-1]
        size *= 16
    return -1


def cuts_of_sentencepiece(model: SentencePieceModel, inline: Iterable[str]) -> str:
    """Where texts can be cut for a sentencepiece model; empty if nowhere.

    ``inline``: added tokens that stand in texts.  A text of ▁ is one of spaces.
    """
    texts = [text for text, _, kind in model.pieces if kind not in (UNKNOWN, CONTROL, BYTE)]
    spaced = [text.replace(" ", "▁") for text in (*texts, *inline)]
    if (
        model.kind != BPE
        or model.rewrites
        or model.drops_spaces
        or model.spaces_behind
        or "▁" not in texts
        or any(_has_space_inside(text) for text in spaced)
    ):
        return ""
    fallback = sum(kind == BYTE for _, _, kind in model.pieces) == 256
    apart = fallback and not any("\n" in text for text in spaced if len(text) > 1)
    return r"(?<=[^ ▁])(?=[ ▁])" + (r"|(?<=\n)(?=[^ ▁])" if apart else "")


def cuts_of_engine(settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where texts can be cut for a tokenizer.json, and the settings that encode what follows.

    Empty, and the settings as they are, where that is not known.
    """
    nowhere, model = ("", settings), settings.get("model") or {}
    added = [token for token in settings.get("added_tokens") or () if not token.get("special")]
    if model.get("type") != "BPE" or model.get("dropout"):
        return nowhere
    for token in added:
        moves = token.get("lstrip") or token.get("rstrip") or token.get("single_word")
        if moves or re.search(r"[\s▁]", token["content"]):
            return nowhere
    normalizers = steps_of(settings.get("normalizer"), "normalizers")
    kinds = [str(step.get("type")) for step in normalizers]
    steps = steps_of(settings.get("pre_tokenizer"), "pretokenizers")
    if kinds in ([], ["NFC"]):
        cuts = _cuts_of_steps(steps, model)
        return (cuts, settings) if cuts else nowhere
    spelled = [step for step in normalizers if step.get("type") == "Replace"]
    spaces = [step.get("pattern") for step in spelled] == [{"String": " "}]
    if sorted(kinds) not in (["Prepend", "Replace"], ["Replace"]) or not spaces or steps:
        return nowhere
    if spelled[0].get("content") != "▁" or _joins_spaces(model) or (added and "Prepend" in kinds):
        return nowhere
    return SPACE_OR_MARK, {**settings, "normalizer": spelled[0]}


SPACE_OR_MARK = r"(?<=[^\s▁])(?= )"


def _cuts_of_steps(steps: list[dict[str, Any]], model: dict[str, Any]) -> str:
    """Where texts can be cut, by the steps before the model."""
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return SPACE if steps[0].get("add_prefix_space", True) else BLANK
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern = (steps[0].get("pattern") or {}).get("Regex", "")
        isolated = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        cuts = PATTERNS.get(pattern, "") if isolated else ""
        return SPACE if cuts and steps[1].get("add_prefix_space", True) else cuts
    if kinds == ["Metaspace"] and steps[0].get("replacement") == "▁" and not _joins_spaces(model):
        return SPACE_OR_MARK
    return ""


def steps_of(step: Any, name: str) -> list[dict[str, Any]]:
    """The steps of a sequence, or the only one."""
    if not isinstance(step, dict):
        return []
    return list(step[name]) if step.get("type") == "Sequence" else [step]


def _joins_spaces(model: dict[str, Any]) -> bool:
    """Whether a merge could join a character and the space after it, or a space is unknown."""
    vocabulary = model.get("vocab") or {}
    return "▁" not in vocabulary or any(map(_has_space_inside, vocabulary))


def _has_space_inside(piece: str) -> bool:
    """Whether a space follows another character in a piece."""
    return "▁" in piece.lstrip("▁")


def compiled(cuts: str) -> re.Pattern[str] | None:
    """The pattern of places to cut; None for an empty one."""
    return re.compile(cuts) if cuts else None
