"""A tokenizer as transformers uses it: names of special tokens inside a text become these tokens.

Everywhere else in llamax such a name is text, because documents and messages of users hold it.  The
prompts of lm-evaluation-harness are finished: their special tokens stand in them as text, and ids
and decoded texts must be those of transformers.  So a ``tokenizer.json`` is used with its
post-processor, also beside a ``tokenizer.model``; from a ``tokenizer.model`` alone the one is made
that ``llamax consolidate`` would write.

Source: transformers 5, ``TokenizersBackend`` (tokenization_utils_tokenizers.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import tokenizers

from llamax.data.chat.encode import Encoder
from llamax.data.chat.templates import Span
from llamax.data.tokenizer.hf_export import from_sentencepiece, why_no_twin
from llamax.data.tokenizer.hf_tokenizer import HuggingFace
from llamax.data.tokenizer.special_tokens import CONFIG
from llamax.data.tokenizer.tokenizer import SentencePiece, Tokenizer, load_tokenizer
from llamax.runtime.json_reader import read_object

NAMES_BOS = ("LlamaTokenizer", "CodeLlamaTokenizer")  # classes that have a BOS without naming it

CLEANED = (".", "?", "!", ",", "'", "n't", "'m", "'s", "'ve", "'re")  # in this order


class HubTokenizer:
    """Text to ids and back, as transformers does it with the files of ``tokenizer``.

    ``bos_id`` and ``eos_id``: the tokens that the files name, or None.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        beside = tokenizer.path.with_name("tokenizer.json")
        if not isinstance(tokenizer, HuggingFace) and beside.is_file():
            tokenizer = load_tokenizer(beside)
        self.tokenizer = tokenizer
        self._engine = _engine(tokenizer)
        self._cleans_up = _cleans_up(tokenizer)
        self.bos_id, self.eos_id = (
            _named_id(tokenizer, key, usual)
            for key, usual in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; ``add_special_tokens``: with the tokens that are put around a text."""
        if self._engine is not None:
            return list(self._engine.encode(text, add_special_tokens=add_special_tokens).ids)
        bos = add_special_tokens and self.tokenizer.adds_bos
        if not text:
            return [self.tokenizer.bos_id] if bos and self.tokenizer.bos_id is not None else []
        encoder = Encoder(self.tokenizer, bos=bos, eos=False)
        (tokens,) = encoder.encode([[Span(text, False)]], prompts=True)
        return [int(i) for i in tokens.ids]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids, with or without the names of special tokens."""
        if self._engine is not None:
            text = str(self._engine.decode(list(ids), skip_special_tokens=skip_special_tokens))
            return _without_spaces(text) if self._cleans_up else text
        names = {number: name for name, number in self.tokenizer.special.items()}
        known = [i for i in ids if i < self.tokenizer.vocab_size]
        if skip_special_tokens:
            return self.tokenizer.decode([i for i in known if i not in names])
        return "".join(
            "".join(names[i] for i in run) if special else self.tokenizer.decode(list(run))
            for special, run in groupby(known, names.__contains__)
        )


def _engine(tokenizer: Tokenizer) -> tokenizers.Tokenizer | None:
    """The tokenizer of ``tokenizers`` that finds special tokens in texts; None if there is none."""
    if isinstance(tokenizer, HuggingFace):
        engine = tokenizers.Tokenizer.from_str(tokenizer.engine.to_str())
        engine.encode_special_tokens = False
        return engine
    if isinstance(tokenizer, SentencePiece) and not why_no_twin(tokenizer.model):
        return from_sentencepiece(tokenizer)
    return None


def _named_id(tokenizer: Tokenizer, key: str, usual: int | None) -> int | None:
    """The id of a named token; ``usual`` where the files beside the tokenizer name no tokens."""
    if not isinstance(tokenizer, HuggingFace):
        return usual
    if key in tokenizer.named:
        return tokenizer.engine.token_to_id(tokenizer.named[key])
    config = _config(tokenizer)
    if not config:
        return usual
    kind = str(config.get("tokenizer_class", ""))
    return usual if kind.removesuffix("Fast") in NAMES_BOS else None


def _cleans_up(tokenizer: Tokenizer) -> bool:
    """Whether decoded texts lose spaces before punctuation, as the files beside it ask for."""
    if not isinstance(tokenizer, HuggingFace):
        return False
    config = _config(tokenizer)
    is_bpe = isinstance(tokenizer.engine.model, tokenizers.models.BPE)
    return bool(config.get("clean_up_tokenization_spaces")) and (
        not is_bpe
        or bool(
            config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
        )
    )


def _without_spaces(text: str) -> str:
    """The text without spaces before punctuation and English contractions."""
    for part in CLEANED:
        text = text.replace(f" {part} " if part == "'" else f" {part}", part)
    return text


def _config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer_config.json beside a tokenizer; empty where there is none."""
    path = tokenizer.path.with_name(CONFIG)
    return read_object(path) if path.is_file() else {}
