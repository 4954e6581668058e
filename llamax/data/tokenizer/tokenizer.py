"""Tokenizers: three kinds of file behind one protocol.

=====================  =====================================================  =====================
file                   what                                                   engine
=====================  =====================================================  =====================
``tokenizer.model``    sentencepiece (Llama 2, Mistral)                       sentencepiece
``tokenizer.json``     Hugging Face tokenizers (any Llama on the Hub)         tokenizers
``NAME.tiktoken``      base64 ranks (Llama 3's original ``tokenizer.model``)  tiktoken
=====================  =====================================================  =====================

The content decides the kind, not the name.  In a folder the first of ``tokenizer.model``,
``tokenizer.json``, ``*.tiktoken`` is taken: conversions between them may differ (on runs of spaces,
for example), so the original of a model comes first.  A ``tokenizer.json`` with added tokens that
the ``tokenizer.model`` lacks comes before it.

The name of a special token inside a document is text: it is encoded letter by letter.

Whole datasets are encoded by a faster engine with the same ids, after ``speed_up``; see
``llamax.data.tokenizer.fast_engine``.  Tokenizers can be sent to other processes, which load an
engine when they need it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llamax.data.tokenizer.cuts import Ids, compiled, cuts_of_sentencepiece
from llamax.data.tokenizer.fast_engine import FastEngine, judged, without_gc
from llamax.data.tokenizer.fast_settings import of_sentencepiece
from llamax.data.tokenizer.fingerprint import BESIDE, fingerprint, state_of
from llamax.data.tokenizer.hf_tokenizer import HuggingFace
from llamax.data.tokenizer.sentencepiece_model import SentencePieceModel, extends, without_prefix
from llamax.data.tokenizer.special_tokens import SpecialTokens, stripping
from llamax.data.tokenizer.tiktoken_file import TikToken
from llamax.runtime.errors import DataError
from llamax.runtime.files import read_input, sha256
from llamax.runtime.hub import local_folder
from llamax.runtime.hub_files import TOKENIZER

MAX_BYTES = 256 << 20  # of a file; the largest on the Hub have some 40 MB
ENGINES = ("_engine", "_bare")  # attributes that each process loads for itself


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

    def token_bytes(self, token: int) -> bytes:
        """What a token adds inside a text: UTF-8, perhaps a space first, or half a character."""

    def encode_documents(self, texts: Sequence[str]) -> list[Ids]:
        """``encode`` of many texts, by the faster engine after ``speed_up``."""

    def encode_after(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of texts that follow a special token: no space is put before them."""

    def encode_rest(self, text: str) -> Ids:
        """The ids of a text that follows one of the ``cuts``."""

    def speed_up(self) -> str:
        """Encode documents by a faster engine from now on; why not, as a clause, where it cannot.

        The ids stay the same.
        """


class SentencePiece:
    """A sentencepiece ``tokenizer.model``; the ids are those of sentencepiece on every text."""

    memory = 64

    def __init__(self, path: Path, raw: bytes) -> None:
        if not raw:
            raise ValueError("it is empty")
        self.path, self.raw = path, raw
        self.fast: FastEngine | None = None
        self.base_size: int = self._engine.vocab_size()
        control = self._engine.is_control([*range(self.base_size)])
        self.special = {self._engine.id_to_piece(n): n for n, is_it in enumerate(control) if is_it}
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

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ENGINES}

    @property
    def model(self) -> SentencePieceModel:
        """The content of the file, read anew: its pieces take as much memory as an engine."""
        return SentencePieceModel.from_bytes(self.raw)

    @cached_property
    def _engine(self) -> Any:
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=self.raw)

    @without_gc()
    def speed_up(self) -> str:
        model = self.model
        prefix = " " if model.dummy_prefix else ""
        words = [text.replace("▁", " ") for text, _, _ in model.pieces]
        self.cuts = compiled(cuts_of_sentencepiece(model, self._inline))
        self.fast, fault = judged(
            lambda: FastEngine(json.dumps(of_sentencepiece(model, self._inline)), False, prefix),
            self.encode,
            [*self.special],
            words,
        )
        return fault

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

    def token_bytes(self, token: int) -> bytes:
        if token >= self.base_size or not self._engine.is_byte(token):
            special = token >= self.base_size or self._engine.is_control(token)
            text = self.decode([token]) if special else self._engine.id_to_piece(token)
            return text.replace("▁", " ").encode()
        return bytes.fromhex(self._engine.id_to_piece(token)[3:5])

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

    def encode_documents(self, texts: Sequence[str]) -> list[Ids]:
        if self.fast is not None:
            return [self.fast.encode(text, self.encode) for text in texts]
        return [np.array(self.encode(text), np.uint32) for text in texts]

    def encode_after(self, texts: Sequence[str]) -> list[Ids]:
        if self._inline:
            return [np.array(self._encode_around(text, self._bare), np.uint32) for text in texts]
        if self.fast is not None:
            return [self.fast.encode(text, self._encode_bare, False) for text in texts]
        # One by one: given a list, the engine takes a thread for every core.
        return [np.array(self._encode_bare(text), np.uint32) for text in texts]

    def encode_rest(self, text: str) -> Ids:
        if self.fast is not None and not self._inline:
            return self.fast.encode(text, self._encode_bare, False)
        return self.encode_after([text])[0]

    @cached_property
    def cuts(self) -> re.Pattern[str] | None:
        return compiled(cuts_of_sentencepiece(self.model, self._inline))

    def _encode_bare(self, text: str) -> list[int]:
        return list(self._bare.encode(text))

    @cached_property
    def _bare(self) -> Any:
        """The same model without the space before every text."""
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=without_prefix(self.raw))


def begin_of_prompts(
    tokenizer: Tokenizer, model_bos: int | None, bos: bool | None = None
) -> int | None:
    """The token with which prompts begin, or None; ``model_bos``: the model's BOS.

    ``bos``: whether there is one, if tokenizer or model have a BOS; None: as the tokenizer does.
    """
    if not (tokenizer.adds_bos if bos is None else bos):
        return None
    return model_bos if tokenizer.bos_id is None else tokenizer.bos_id


@without_gc()
def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a file, from a folder with one, or from a repository of the Hub.

    Raises DataError if there is none, or if it cannot be read; HubError if it cannot be downloaded.
    """
    path = tokenizer_file(local_folder(path, TOKENIZER))
    try:
        raw = read_input(path, MAX_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a tokenizer") from None
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
    if extends(path / "tokenizer.json", path / "tokenizer.model"):
        return path / "tokenizer.json"
    for candidate in (*ranked, path / "tekken.json"):
        if candidate.is_file():
            return candidate
    raise DataError(
        f"{path}: holds no tokenizer.model, tokenizer.json or *.tiktoken; give `tokenizer=PATH`"
    )


def _id(number: Any) -> int | None:
    return int(number) if number >= 0 else None
