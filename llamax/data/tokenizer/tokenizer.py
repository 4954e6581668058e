"""Tokenizers: three kinds of file behind one protocol.

=====================  =====================================================  =====================
file                   what                                                   engine
=====================  =====================================================  =====================
``tokenizer.model``    sentencepiece (Llama 2, Mistral)                       fast_bpe or its own
``tokenizer.json``     Hugging Face tokenizers (any Llama on the Hub)         tokenizers
``NAME.tiktoken``      base64 ranks (Llama 3's original ``tokenizer.model``)  tiktoken
=====================  =====================================================  =====================

The content decides the kind, not the name.  In a folder the first of ``tokenizer.model``,
``tokenizer.json``, ``*.tiktoken`` is taken: conversions between them may differ (on runs of spaces,
for example), so the original of a model comes first.

The name of a special token inside a document is text: it is encoded letter by letter.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llamax.runtime.errors import DataError
from llamax.runtime.files import write_atomic

Ids = npt.NDArray[np.uint32]

# Llama 3's split pattern and special tokens, as in meta-llama/llama-models, llama3/tokenizer.py.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(2, 247)),
)
BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>")
EOS = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")
SPECIAL = ("tokenizer_config.json", "special_tokens_map.json")  # name BOS and EOS


class Tokenizer(Protocol):
    """Text to token ids and back; ``fingerprint`` is the sha256 of the file at ``path``."""

    path: Path
    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    special: dict[str, int]  # ids of special tokens by name; no text is encoded to them

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""

    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[Ids]:
        """``encode`` of many texts, with ``threads`` threads."""

    def encode_after(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of texts that follow a special token: no space is put before them."""


class SentencePiece:
    """A sentencepiece ``tokenizer.model``; the ids are those of sentencepiece on every text."""

    def __init__(self, path: Path, raw: bytes) -> None:
        import sentencepiece

        from llamax.data.tokenizer.fast_bpe import Segments
        from llamax.data.tokenizer.sentencepiece_model import CONTROL, SentencePieceModel

        self.path, self.fingerprint = path, hashlib.sha256(raw).hexdigest()
        self.model = SentencePieceModel.from_bytes(raw)
        self._engine = sentencepiece.SentencePieceProcessor(model_proto=raw)
        self._segments = Segments.of(self.model)
        self.vocab_size: int = self._engine.vocab_size()
        self.bos_id = _id(self._engine.bos_id())
        self.eos_id = _id(self._engine.eos_id())
        self.special = {
            text: number
            for number, (text, _, kind) in enumerate(self.model.pieces)
            if kind == CONTROL
        }

    @property
    def fast(self) -> bool:
        """Whether ``encode_documents`` uses the faster engine."""
        return self._segments is not None

    def encode(self, text: str) -> list[int]:
        return list(self._engine.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._engine.decode(list(ids)))

    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[Ids]:
        if self._segments is not None:
            return self._segments.encode(texts, threads)
        found = self._engine.encode(list(texts), num_threads=threads)
        return [np.array(ids, np.uint32) for ids in found]

    def encode_after(self, texts: Sequence[str]) -> list[Ids]:
        return [np.array(ids, np.uint32) for ids in self._bare.encode(list(texts))]

    @cached_property
    def _bare(self) -> Any:
        """The same model without the space before every text."""
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=self.model.without_prefix())


class HuggingFace:
    """A Hugging Face ``tokenizer.json``; BOS and EOS by the files beside it, or by name."""

    def __init__(self, path: Path, raw: bytes) -> None:
        import tokenizers

        self.path, self.fingerprint = path, hashlib.sha256(raw).hexdigest()
        self.engine = tokenizers.Tokenizer.from_str(raw.decode())
        self.engine.encode_special_tokens = True
        self.engine.no_truncation()
        self.engine.no_padding()
        self.vocab_size = max(self.engine.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id = self._special("bos_token", BOS)
        self.eos_id = self._special("eos_token", EOS)
        added = self.engine.get_added_tokens_decoder()
        self.special = {str(token): i for i, token in added.items() if token.special}

    @property
    def beside(self) -> list[Path]:
        """The files beside it that belong to it."""
        names = (*SPECIAL, "chat_template.jinja")
        return [path for path in map(self.path.with_name, names) if path.is_file()]

    def _special(self, key: str, usual: Iterable[str]) -> int | None:
        names = list(usual)
        for config in self.beside:
            if config.name in SPECIAL:
                value = json.loads(config.read_text(encoding="utf-8")).get(key)
                if name := value.get("content") if isinstance(value, dict) else value:
                    names.insert(0, name)
        ids = (self.engine.token_to_id(name) for name in names)
        return next((i for i in ids if i is not None), None)

    def encode(self, text: str) -> list[int]:
        return list(self.engine.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.engine.decode(list(ids), skip_special_tokens=True))

    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[Ids]:
        if threads == 1:
            return [np.array(self.encode(text), np.uint32) for text in texts]
        found = self.engine.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, np.uint32) for each in found]

    def encode_after(self, texts: Sequence[str]) -> list[Ids]:
        return [np.array(self._after(text), np.uint32) for text in texts]

    def _after(self, text: str) -> list[int]:
        name = next(iter(self.special), "")
        if not name or any(each in text for each in self.special):
            return self.encode(text)
        self.engine.encode_special_tokens = False
        try:
            return list(self.engine.encode(name + text, add_special_tokens=False).ids[1:])
        finally:
            self.engine.encode_special_tokens = True


class TikToken:
    """A file of base64 ranks, with Llama 3's split pattern and special tokens."""

    def __init__(self, path: Path, raw: bytes) -> None:
        import tiktoken

        self.path, self.fingerprint = path, hashlib.sha256(raw).hexdigest()
        lines = (line.split() for line in raw.splitlines() if line)
        self.ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        if sorted(self.ranks.values()) != list(range(len(self.ranks))):
            raise ValueError("its ranks do not count from 0")
        if missing := sum(bytes([byte]) not in self.ranks for byte in range(256)):
            raise ValueError(f"{missing} of the 256 bytes have no rank")
        self.special = {name: len(self.ranks) + i for i, name in enumerate(LLAMA3_SPECIAL)}
        self.engine = tiktoken.Encoding(
            path.name,
            pat_str=LLAMA3_PATTERN,
            mergeable_ranks=self.ranks,
            special_tokens=self.special,
        )
        self.vocab_size = len(self.ranks) + len(self.special)
        self.bos_id: int | None = self.special["<|begin_of_text|>"]
        self.eos_id: int | None = self.special["<|end_of_text|>"]

    def encode(self, text: str) -> list[int]:
        return self.engine.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.engine.decode([i for i in ids if i < len(self.ranks)])

    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[Ids]:
        found = self.engine.encode_ordinary_batch(list(texts), num_threads=threads)
        return [np.array(ids, np.uint32) for ids in found]

    def encode_after(self, texts: Sequence[str]) -> list[Ids]:
        return self.encode_documents(texts)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a file, or from a folder with one.

    Raises DataError if there is none, or if it cannot be read.
    """
    path = tokenizer_file(Path(path))
    raw = path.read_bytes()
    try:
        if raw.lstrip()[:1] == b"{":
            return HuggingFace(path, raw)
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", raw):
            return TikToken(path, raw)
        return SentencePiece(path, raw)
    except Exception as error:  # engines raise various types, one of them bare Exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: is not a tokenizer ({reason}); give a sentencepiece tokenizer.model, "
            "a Hugging Face tokenizer.json or a tiktoken file"
        ) from None


def tokenizer_file(path: Path) -> Path:
    """``path``, or the tokenizer file in that folder; DataError if there is none."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(f"{path}: no such tokenizer; give a tokenizer file or a folder with one")
    ranked = [path / "tokenizer.model", path / "tokenizer.json", *sorted(path.glob("*.tiktoken"))]
    for candidate in ranked:
        if candidate.is_file():
            return candidate
    raise DataError(
        f"{path}: holds no tokenizer.model, tokenizer.json or *.tiktoken; give the tokenizer's path"
    )


def train_sentencepiece(texts: Iterable[str], vocab_size: int, out: str | Path) -> Path:
    """Train a tokenizer with the settings of Llama 2's, and write it to ``out``.

    BPE with byte fallback, single digits, no normalization (identity), runs of spaces kept.
    Texts are fed line by line.  Raises DataError if there is too little text for ``vocab_size``.
    """
    import sentencepiece

    model: list[bytes] = []

    class Sink:
        def write(self, raw: bytes) -> None:
            model.append(raw)

    def lines() -> Iterator[str]:
        for text in texts:
            yield from (line for line in text.split("\n") if line)

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=Sink(),
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=True,
            character_coverage=0.9999,
            max_sentence_length=16384,
            input_sentence_size=1_000_000,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        # The reason stands between the engine's file, line and condition, and its advice.
        reason = " ".join(str(error).split()).rpartition("] ")[2].partition(". ")[0]
        raise DataError(
            f"no tokenizer of {vocab_size} pieces can be trained on this text ({reason}); "
            "use another size (300 or more), or more text"
        ) from None
    write_atomic(Path(out), b"".join(model))
    return Path(out)


def _id(number: Any) -> int | None:
    return int(number) if number >= 0 else None
