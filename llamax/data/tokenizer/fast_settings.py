"""Tokenizers as settings of gigatoken, which reads a ``tokenizer.json``.

gigatoken ignores settings that it does not know, so every one is checked here.  Names of special
tokens are left out: in a document they are text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from llamax.data.tokenizer.cuts import QWEN2_PATTERN, TEKKEN_PATTERN, steps_of
from llamax.data.tokenizer.llama3 import LLAMA3_PATTERN
from llamax.data.tokenizer.sentencepiece_model import (
    BYTE,
    NORMAL,
    USER_DEFINED,
    SentencePieceModel,
    why_not_plain,
)

SPLITS = (LLAMA3_PATTERN, QWEN2_PATTERN, TEKKEN_PATTERN)
SPACES_AS_MARKS = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
MODEL_KEYS = {
    "type",
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
    "ignore_merges",
    "vocab",
    "merges",
}


class Unsupported(ValueError):
    """A tokenizer that gigatoken does not know; the message is a clause such as "is not a BPE"."""


def byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def merges_of(pieces: Iterable[tuple[str, float]]) -> list[tuple[str, str]]:
    """The merges of sentencepiece's BPE: every pair of pieces whose text is a piece, best first.

    Of pieces with one score the longest comes first: leftmost merges make a run of spaces grow.
    """
    pieces = list(pieces)
    known = {text for text, _ in pieces}
    return [
        (left, right)
        for text, _ in sorted(pieces, key=lambda piece: (-piece[1], -len(piece[0])))
        for cut in range(1, len(text))
        if (left := text[:cut]) in known and (right := text[cut:]) in known
    ]


def of_sentencepiece(model: SentencePieceModel, inline: Iterable[str]) -> dict[str, Any]:
    """The settings of a sentencepiece model that puts no space before a text.

    ``inline``: added tokens that stand in texts.  Raises Unsupported.
    """
    symbols = [(n, text) for n, (text, _, kind) in enumerate(model.pieces) if kind == USER_DEFINED]
    pieces = [(text, score) for text, score, kind in model.pieces if kind == NORMAL]
    if clause := why_not_plain(model):
        raise Unsupported(clause)
    for fault, clause in (
        (any(" " in text for text, _ in pieces), "has pieces with spaces"),
        (_is_ambiguous(pieces), "has several pieces of one score"),
        (any(True for _ in inline), "has added tokens in texts"),
    ):
        if fault:
            raise Unsupported(clause)
    vocabulary = {t: n for n, (t, _, kind) in enumerate(model.pieces) if kind in (NORMAL, BYTE)}
    return {
        "added_tokens": [{"id": n, "content": text, "special": False} for n, text in symbols],
        "normalizer": SPACES_AS_MARKS,
        "pre_tokenizer": None,
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": merges_of(pieces),
        },
    }


def _is_ambiguous(pieces: list[tuple[str, float]]) -> bool:
    """Whether pieces that merges make have one score, other than runs of spaces."""
    times = Counter(score for text, score in pieces if len(text) > 1)
    merged = (text for text, score in pieces if len(text) > 1 and times[score] > 1)
    return any(set(text) != {"▁"} for text in merged)


def of_engine(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a tokenizer.json, in which names of special tokens are text.

    Raises Unsupported.
    """
    model = settings.get("model") or {}
    added = [token for token in settings.get("added_tokens") or () if not token.get("special")]
    if model.get("type") != "BPE":
        raise Unsupported("is not a BPE")
    if unknown := sorted(model.keys() - MODEL_KEYS):
        raise Unsupported(f"has an unknown setting model.{unknown[0]}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise Unsupported(f"has model.{key}")
    if any(token.get(key) for token in added for key in ("lstrip", "rstrip", "single_word")):
        raise Unsupported("has added tokens that depend on the text around them")
    if model.get("byte_fallback"):
        _check_sentencepiece(settings, model)
    else:
        _check_byte_level(settings, model)
    return {**settings, "added_tokens": added, "post_processor": None, "decoder": None}


def _check_byte_level(settings: dict[str, Any], model: dict[str, Any]) -> None:
    if settings.get("normalizer"):
        raise Unsupported("normalizes text")
    steps = steps_of(settings.get("pre_tokenizer"), "pretokenizers")
    kinds = [step.get("type") for step in steps]
    if kinds == ["Split", "ByteLevel"]:
        split, letters = steps
        pattern = (split.get("pattern") or {}).get("Regex")
        isolated = split.get("behavior") == "Isolated" and not split.get("invert")
        plain = not letters.get("use_regex", True) and not letters.get("add_prefix_space", True)
        if pattern not in SPLITS or not isolated or not plain:
            raise Unsupported("splits text by another pattern than those of GPT-2 and Llama 3")
    elif kinds != ["ByteLevel"] or not steps[0].get("use_regex", True):
        raise Unsupported("splits text by another pattern than those of GPT-2 and Llama 3")
    if not model["vocab"].keys() >= set(byte_letters()):
        raise Unsupported("lacks tokens of single bytes")


def _check_sentencepiece(settings: dict[str, Any], model: dict[str, Any]) -> None:
    normalizers = steps_of(settings.get("normalizer"), "normalizers")
    steps = steps_of(settings.get("pre_tokenizer"), "pretokenizers")
    kinds = [step.get("type") for step in normalizers]
    spaces = [step for step in normalizers if step.get("type") == "Replace"]
    other = any(step != SPACES_AS_MARKS for step in spaces)
    if kinds not in ([], ["Replace"], ["Prepend", "Replace"]) or other:
        raise Unsupported("normalizes text")
    if [step.get("type") for step in steps] not in ([], ["Metaspace"]):
        raise Unsupported("splits text in a way of its own")
    if model.get("ignore_merges"):
        raise Unsupported("has model.ignore_merges")
    if not model["vocab"].keys() >= {f"<0x{byte:02X}>" for byte in range(256)}:
        raise Unsupported("has no bytes to fall back on")
