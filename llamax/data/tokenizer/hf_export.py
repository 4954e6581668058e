"""Export a tokenizer to a Hugging Face folder, with the ids of the original.

``tokenizer.json`` is the file that transformers reads; the original, a ``tokenizer_config.json``
and a ``special_tokens_map.json`` are written beside it.

From sentencepiece: the model is the BPE of ``tokenizers`` without a pre-tokenizer.  A piece may be
merged from any two pieces, so all its splits are merges, in the order of the pieces' scores.
Where several pieces have one score (Mistral's runs of spaces), sentencepiece merges leftmost first,
so the left run grows; in ``tokenizers`` the longest result first has the same effect.

User-defined pieces (Mistral v3 and v7) are cut out of the text before anything is merged, the
longest first, and each is looked up whole; so is any other stretch between them that is one piece,
which gives the same id where ``every_piece_is_itself``.

From tiktoken: a token's merge is the last merge by which tiktoken makes it.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import sentencepiece  # type: ignore[import-untyped, unused-ignore]
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from llamax.data.tokenizer.fast_settings import byte_letters, merges_of
from llamax.data.tokenizer.hf_tokenizer import HuggingFace
from llamax.data.tokenizer.llama3 import LLAMA3_PATTERN
from llamax.data.tokenizer.sentencepiece_model import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
    why_not_plain,
    without_prefix,
)
from llamax.data.tokenizer.special_tokens import files_beside
from llamax.data.tokenizer.tiktoken_file import TikToken
from llamax.data.tokenizer.tokenizer import SentencePiece, Tokenizer
from llamax.runtime.errors import DataError
from llamax.runtime.files import write_atomic
from llamax.runtime.hub_files import CHAT_TEMPLATE
from llamax.runtime.json_reader import read_object
from llamax.runtime.logging import logger


def export_tokenizer(
    tokenizer: Tokenizer, folder: str | Path, max_length: int | None = None
) -> None:
    """Write a tokenizer's files into a Hugging Face folder.

    ``max_length`` is the model's context in tokens.  For a sentencepiece model that ``tokenizers``
    cannot reproduce exactly, only ``tokenizer.model`` is written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    raw = tokenizer.path.read_bytes()
    if isinstance(tokenizer, HuggingFace):
        engine = tokenizer.engine
        write_atomic(folder / "tokenizer.json", raw)
    else:
        if isinstance(tokenizer, SentencePiece):
            write_atomic(folder / "tokenizer.model", raw)
            if reason := why_no_twin(tokenizer.model):
                for path in files_beside(tokenizer.path):
                    write_atomic(folder / path.name, path.read_bytes())
                logger.warning(
                    "%s: %s, which a tokenizer.json cannot reproduce, so only the model is "
                    "exported: the package sentencepiece and transformers 4 with use_fast=False "
                    "make the ids of training, but transformers 5 and fast tokenizers other ones",
                    tokenizer.path,
                    reason,
                )
                return
            engine = from_sentencepiece(tokenizer)
        else:
            assert isinstance(tokenizer, TikToken)
            engine = from_tiktoken(tokenizer)
            write_atomic(folder / "tokenizer.tiktoken", raw)
        write_atomic(folder / "tokenizer.json", engine.to_str(pretty=False).encode())
    special = dict(tokenizer.named)
    for key, number in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        if number is not None:
            special[key] = str(engine.id_to_token(number))
    if isinstance(tokenizer, SentencePiece):
        special.setdefault("unk_token", engine.model.unk_token)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **({"model_max_length": max_length} if max_length else {}),
        **({} if tokenizer.adds_bos else {"add_bos_token": False}),
        **special,
        **_chat_template(tokenizer.path.parent),
    }
    if (template := tokenizer.path.with_name(CHAT_TEMPLATE)).is_file():
        write_atomic(folder / template.name, template.read_bytes())
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", special)


def _chat_template(folder: Path) -> dict[str, Any]:
    """The chat template in the tokenizer_config.json of a folder, if there is one."""
    path = folder / "tokenizer_config.json"
    config = read_object(path) if path.is_file() else {}
    return {key: config[key] for key in ("chat_template",) if config.get(key)}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def why_no_twin(model: SentencePieceModel) -> str:
    """What ``tokenizers`` cannot do as the model does, as a clause; empty if its ids are equal."""
    symbols = any(kind == USER_DEFINED for _, _, kind in model.pieces)
    why = why_not_plain(model)
    if not why and symbols and not every_piece_is_itself(model):
        return "has user-defined pieces, and pieces that no text becomes"
    return why


def every_piece_is_itself(model: SentencePieceModel) -> bool:
    """Whether sentencepiece makes of each normal piece's text that piece alone."""
    engine = sentencepiece.SentencePieceProcessor(model_proto=without_prefix(model.raw))
    normal = [
        (number, text) for number, (text, _, kind) in enumerate(model.pieces) if kind == NORMAL
    ]
    found = engine.encode([text.replace("▁", " ") for _, text in normal])
    return all(ids == [number] for ids, (number, _) in zip(found, normal, strict=True))


def from_sentencepiece(tokenizer: SentencePiece) -> tokenizers.Tokenizer:
    """The same BPE in ``tokenizers``; see ``why_no_twin``."""
    model = tokenizer.model
    vocabulary = {text: number for number, (text, _, _) in enumerate(model.pieces)}
    pieces = [(text, score) for text, score, kind in model.pieces if kind == NORMAL]
    merges = merges_of(pieces)
    unknown = next(text for text, _, kind in model.pieces if kind == UNKNOWN)
    symbols = [text for text, _, kind in model.pieces if kind == USER_DEFINED]
    options = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
    engine = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, ignore_merges=bool(symbols), **options)
    )
    if symbols:
        longest_first = "|".join(map(re.escape, sorted(symbols, key=len, reverse=True)))
        engine.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), "isolated")
    prepend = [normalizers.Prepend("▁")] if model.dummy_prefix else []
    engine.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if model.dummy_prefix else []
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    names = [text for text, _, kind in model.pieces if kind in (CONTROL, UNKNOWN)]
    engine.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    for number, token in sorted(tokenizer.added.items()):
        kind = {"special": token.special, "lstrip": token.lstrip, "rstrip": token.rstrip}
        engine.add_tokens([AddedToken(token.text, normalized=not token.special, **kind)])
        if engine.token_to_id(token.text) != number:
            raise DataError(
                f"{tokenizer.path}: the added token {token.text} has id {number}, which leaves a "
                f"gap after {number - 1}; number added tokens from {tokenizer.base_size} on"
            )
    return _with_bos(engine, tokenizer.bos_id if tokenizer.adds_bos else None)


def from_tiktoken(tokenizer: TikToken) -> tokenizers.Tokenizer:
    """The same byte-level BPE in ``tokenizers``."""
    ranks = tokenizer.ranks
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1 and len(parts := _last_merge(token, ranks)) == 2:
            merges.append((spell(parts[0]), spell(parts[1])))
    engine = tokenizers.Tokenizer(
        models.BPE({spell(t): rank for t, rank in ranks.items()}, merges, ignore_merges=True)
    )
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in tokenizer.special]
    )
    return _with_bos(engine, tokenizer.bos_id)


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The parts of a token after every merge of a lower rank."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        rank, at = min(
            (ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(pairwise(parts))
        )
        if rank >= ranks[token]:
            return parts
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def _with_bos(engine: tokenizers.Tokenizer, bos: int | None) -> tokenizers.Tokenizer:
    """Put BOS before every text that is encoded with special tokens."""
    if bos is not None:
        name = engine.id_to_token(bos)
        engine.post_processor = processors.TemplateProcessing(
            single=f"{name} $A", pair=f"{name} $A {name}:1 $B:1", special_tokens=[(name, bos)]
        )
    return engine
