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
for example), so the original of a model comes first.  A ``tokenizer.json`` with added tokens that
the ``tokenizer.model`` lacks comes before it.

The name of a special token inside a document is text: it is encoded letter by letter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llamax.data.tokenizer.cuts import Ids, compiled, cuts_of_engine, cuts_of_sentencepiece
from llamax.data.tokenizer.fingerprint import BESIDE, fingerprint
from llamax.data.tokenizer.special_tokens import (
    FILES,
    AddedToken,
    SpecialTokens,
    stripping,
    token_id,
)
from llamax.data.tokenizer.tiktoken_file import TikToken
from llamax.runtime.errors import DataError
from llamax.runtime.files import sha256

BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>")
EOS = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")


class Tokenizer(Protocol):
    """Text to token ids and back; ``fingerprint``: see ``llamax.data.tokenizer.fingerprint``."""

    path: Path
    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    special: dict[str, int]  # ids of special tokens by name; no text is encoded to them
    named: dict[str, str]  # texts of named tokens, such as pad_token, as the files name them
    strips: dict[str, tuple[bool, bool]]  # special tokens that take the space before or after them
    base_size: int  # the vocabulary without added tokens: ids that any text may have
    adds_bos: bool  # whether a text by itself begins with BOS
    space_after_bos: bool  # whether a text after BOS is encoded as one at the beginning
    memory: int  # bytes that encoding takes for each byte of text, about

    @property
    def cuts(self) -> re.Pattern[str] | None:
        """Where a long text can be cut; None: nowhere."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""

    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[Ids]:
        """``encode`` of many texts, with ``threads`` threads."""

    def encode_after(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of texts that follow a special token: no space is put before them."""

    def encode_rest(self, text: str) -> Ids:
        """The ids of a text that follows one of the ``cuts``."""


class SentencePiece:
    """A sentencepiece ``tokenizer.model``; the ids are those of sentencepiece on every text."""

    memory = 64

    def __init__(self, path: Path, raw: bytes) -> None:
        import sentencepiece

        from llamax.data.tokenizer.fast_bpe import Segments
        from llamax.data.tokenizer.sentencepiece_model import CONTROL, SentencePieceModel

        self.path = path
        self.model = SentencePieceModel.from_bytes(raw)
        self._engine = sentencepiece.SentencePieceProcessor(model_proto=raw)
        self._segments = Segments.of(self.model)
        self.base_size: int = self._engine.vocab_size()
        self.special = {
            text: number
            for number, (text, _, kind) in enumerate(self.model.pieces)
            if kind == CONTROL
        }
        self.bos_id, self.eos_id = _id(self._engine.bos_id()), _id(self._engine.eos_id())
        self.added, self.strips, self.adds_bos = {}, {}, self.bos_id is not None
        alone = state_of(self)
        beside = SpecialTokens.beside(path)
        self.added = {n: token for n, token in beside.added.items() if n >= self.base_size}
        self.special |= {token.text: n for n, token in self.added.items() if token.special}
        self._inline = {token.text: n for n, token in self.added.items() if not token.special}
        self.vocab_size: int = max([self.base_size - 1, *self.added]) + 1
        self.named, self.space_after_bos = beside.named, True
        self.strips = stripping(self.added.values())
        self.bos_id = self.special.get(self.named.get("bos_token", ""), self.bos_id)
        self.eos_id = self.special.get(self.named.get("eos_token", ""), self.eos_id)
        self.adds_bos = self.bos_id is not None and beside.add_bos is not False
        self.fingerprint = fingerprint(raw, alone, state_of(self))

    @property
    def fast(self) -> bool:
        """Whether ``encode_documents`` uses the faster engine."""
        return self._segments is not None

    @property
    def beside(self) -> list[Path]:
        """The files beside it that belong to it."""
        return [path for path in map(self.path.with_name, FILES) if path.is_file()]

    def encode(self, text: str) -> list[int]:
        if self._inline:
            return self._encode_around(text, self._engine)
        return list(self._engine.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        if not self.added:
            return str(self._engine.decode(list(ids)))
        text, engine = "", self._engine
        for is_added, run in groupby(ids, lambda i: i >= self.base_size):
            if is_added:
                tokens = (self.added.get(i) for i in run)
                text += "".join(token.text for token in tokens if token and not token.special)
            else:
                text += engine.decode(list(run))
            engine = self._bare if text else engine
        return text

    def _encode_around(self, text: str, engine: Any) -> list[int]:
        """The ids of a text in which added tokens that are not special stand as text."""
        names = sorted(self._inline, key=len, reverse=True)
        ids: list[int] = []
        for piece in re.split(f"({'|'.join(map(re.escape, names))})", text):
            if piece in self._inline:
                ids.append(self._inline[piece])
                engine = self._bare
            elif piece:
                ids += engine.encode(piece)
        return ids

    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[Ids]:
        if self._inline:
            return [np.array(self.encode(text), np.uint32) for text in texts]
        if self._segments is not None:
            return self._segments.encode(texts, threads)
        found = self._engine.encode(list(texts), num_threads=threads)
        return [np.array(ids, np.uint32) for ids in found]

    def encode_after(self, texts: Sequence[str]) -> list[Ids]:
        if self._inline:
            return [np.array(self._encode_around(text, self._bare), np.uint32) for text in texts]
        return [np.array(ids, np.uint32) for ids in self._bare.encode(list(texts))]

    def encode_rest(self, text: str) -> Ids:
        if self._inline or self._segments is None:
            return self.encode_after([text])[0]
        return self._segments.encode([text], begin=False)[0]

    @cached_property
    def cuts(self) -> re.Pattern[str] | None:
        return compiled(cuts_of_sentencepiece(self.model, self._inline))

    @cached_property
    def _bare(self) -> Any:
        """The same model without the space before every text."""
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=self.model.without_prefix())


class HuggingFace:
    """A Hugging Face ``tokenizer.json``; BOS and EOS by the files beside it, or by name."""

    memory = 256

    def __init__(self, path: Path, raw: bytes) -> None:
        import tokenizers

        self.path = path
        self.engine = tokenizers.Tokenizer.from_str(raw.decode())
        self.engine.no_truncation()
        self.engine.no_padding()
        self.named = {}
        self._find_special()
        alone = state_of(self)
        beside = SpecialTokens.beside(path)
        self._add(beside)
        ids = self.engine.get_vocab(with_added_tokens=True).values()
        self.vocab_size = token_id(max(ids)) + 1
        self.base_size = (
            max(self.engine.get_vocab(with_added_tokens=False).values(), default=-1) + 1
        )
        self.named, self.space_after_bos = beside.named, False
        self._find_special()
        self.fingerprint = fingerprint(raw, alone, state_of(self))
        self.engine.encode_special_tokens = True

    def _find_special(self) -> None:
        """Set the special tokens, and BOS and EOS among them, from the engine and the names."""
        self.bos_id = self._special("bos_token", BOS)
        self.eos_id = self._special("eos_token", EOS)
        # As in transformers 5: beside a tokenizer.json its add_bos_token has no effect.
        first = self.engine.encode("a").ids[:1]
        self.adds_bos = self.bos_id is not None and first == [self.bos_id]
        added = self.engine.get_added_tokens_decoder()
        self.special = {str(token): i for i, token in added.items() if token.special}
        self.added = {
            i: AddedToken(token.content, token.special, token.lstrip, token.rstrip)
            for i, token in added.items()
        }
        self.strips = stripping(self.added.values())

    def _add(self, beside: SpecialTokens) -> None:
        """Add the tokens that the files beside it name and it lacks, as transformers does."""
        import tokenizers

        known = {token.content for token in self.engine.get_added_tokens_decoder().values()}
        tokens = [token for _, token in sorted(beside.added.items())]
        names = (*beside.named.values(), *beside.extra)
        tokens += [AddedToken(name, True) for name in names]
        for token in tokens:
            if token.text not in known:
                known.add(token.text)
                strips = {"lstrip": token.lstrip, "rstrip": token.rstrip}
                kind = {"special": token.special, "normalized": not token.special}
                self.engine.add_tokens([tokenizers.AddedToken(token.text, **strips, **kind)])

    @property
    def beside(self) -> list[Path]:
        """The files beside it that belong to it."""
        return [path for path in map(self.path.with_name, FILES) if path.is_file()]

    def _special(self, key: str, usual: Iterable[str]) -> int | None:
        names = [self.named[key]] if key in self.named else []
        ids = (self.engine.token_to_id(name) for name in (*names, *usual))
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
        encode = self._inside.encode
        return [np.array(encode(text, add_special_tokens=False).ids, np.uint32) for text in texts]

    def encode_rest(self, text: str) -> Ids:
        return np.array(self._rest[1].encode(text, add_special_tokens=False).ids, np.uint32)

    @property
    def cuts(self) -> re.Pattern[str] | None:
        return self._rest[0]

    @cached_property
    def _rest(self) -> tuple[re.Pattern[str] | None, Any]:
        """Where texts can be cut, and the engine for what follows."""
        settings = json.loads(self.engine.to_str())
        cuts, changed = cuts_of_engine(settings)
        return compiled(cuts), self.engine if changed is settings else self._engine_of(changed)

    @staticmethod
    def _engine_of(settings: dict[str, Any]) -> Any:
        """The engine with other settings; names of special tokens are text to it."""
        import tokenizers

        engine = tokenizers.Tokenizer.from_str(json.dumps(settings))
        engine.encode_special_tokens = True
        return engine

    @cached_property
    def _inside(self) -> Any:
        """The engine for a text that does not begin the document.

        Only Metaspace's prepend_scheme "first" asks for the place of a text; the other ways to put
        a space before texts put one before each text between special tokens.
        """
        settings = json.loads(self.engine.to_str())
        step = settings.get("pre_tokenizer") or {}
        steps = [part for part in (step, *step.get("pretokenizers", ())) if isinstance(part, dict)]
        first = [part for part in steps if part.get("prepend_scheme") == "first"]
        if not first:
            return self.engine
        for part in first:
            part["prepend_scheme"] = "never"
        return self._engine_of(settings)


def state_of(tokenizer: SentencePiece | HuggingFace) -> dict[str, Any]:
    """What decides ids besides the trained vocabulary."""
    return {
        "special": sorted(tokenizer.special.items()),
        "added": sorted([number, *token] for number, token in tokenizer.added.items()),
        "strips": sorted(tokenizer.strips.items()),
        "bos": [tokenizer.bos_id, tokenizer.adds_bos],
        "eos": tokenizer.eos_id,
    }


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a file, or from a folder with one.

    Raises DataError if there is none, or if it cannot be read.
    """
    path = tokenizer_file(Path(path))
    raw = path.read_bytes()
    try:
        if raw.lstrip()[:1] == b"{" and b'"token_bytes"' in raw[:20_000]:
            raise DataError("it is a Tekken file, which only mistral-common reads")
        if raw.lstrip()[:1] == b"{":
            return HuggingFace(path, raw)
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", raw):
            return TikToken(path, raw)
        return SentencePiece(path, raw)
    except BaseException as error:  # engines raise various types, one of them bare Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # a panic of Rust is a BaseException that no module exports
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: is not a tokenizer ({reason}); give a sentencepiece tokenizer.model, "
            "a Hugging Face tokenizer.json or a tiktoken file"
        ) from None


def fingerprint_of_file(path: Path) -> str:
    """The fingerprint of the tokenizer in a file; DataError if it cannot be read.

    The tokenizer is loaded only if there are files beside it.
    """
    if any(path.with_name(name).is_file() for name in BESIDE):
        return load_tokenizer(path).fingerprint
    return sha256(path)


def tokenizer_file(path: Path) -> Path:
    """``path``, or the tokenizer file in that folder; DataError if there is none."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(f"{path}: no such tokenizer; give a tokenizer file or a folder with one")
    ranked = [path / "tokenizer.model", path / "tokenizer.json", *sorted(path.glob("*.tiktoken"))]
    from llamax.data.tokenizer.sentencepiece_model import extends

    if extends(path / "tokenizer.json", path / "tokenizer.model"):
        return path / "tokenizer.json"
    for candidate in (*ranked, path / "tekken.json"):
        if candidate.is_file():
            return candidate
    raise DataError(
        f"{path}: holds no tokenizer.model, tokenizer.json or *.tiktoken; give the tokenizer's path"
    )


def _id(number: Any) -> int | None:
    return int(number) if number >= 0 else None
