"""A tokenizer in tiktoken's form: base64 tokens with their ranks, as Llama 3 was published."""

from __future__ import annotations

import re
from binascii import a2b_base64
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llamax.data.tokenizer.cuts import PATTERNS, Ids, compiled
from llamax.data.tokenizer.fast_engine import FastEngine, judged, without_gc
from llamax.data.tokenizer.fingerprint import fingerprint
from llamax.data.tokenizer.llama3 import LLAMA3_PATTERN, LLAMA3_SPECIAL
from llamax.runtime.errors import DataError

ENGINES = ("engine", "ranks")  # attributes that each process loads for itself


LONGEST_SPACE = 900_000  # characters in a row that the engine is known to encode
SPACES = re.compile(r"\s+")


class TikToken:
    """A file of base64 ranks, with Llama 3's split pattern and special tokens."""

    memory = 64
    cuts = compiled(PATTERNS[LLAMA3_PATTERN])

    def __init__(self, path: Path, raw: bytes) -> None:
        self.path, self.fingerprint = path, fingerprint(raw, {}, {})
        self._raw = raw
        self.fast: FastEngine | None = None
        if sorted(self.ranks.values()) != list(range(len(self.ranks))):
            raise ValueError("its ranks do not count from 0")
        if missing := sum(bytes([byte]) not in self.ranks for byte in range(256)):
            raise ValueError(f"{missing} of the 256 bytes have no rank")
        self.special = {name: len(self.ranks) + i for i, name in enumerate(LLAMA3_SPECIAL)}
        self.base_size, self.vocab_size = len(self.ranks), len(self.ranks) + len(self.special)
        self.named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
        self.strips: dict[str, tuple[bool, bool]] = {}
        self.adds_bos, self.space_after_bos = True, False
        self.bos_id: int | None = self.special["<|begin_of_text|>"]
        self.eos_id: int | None = self.special["<|end_of_text|>"]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ENGINES}

    @cached_property
    def ranks(self) -> dict[bytes, int]:
        """The rank of each token."""
        lines = (line.split() for line in self._raw.splitlines() if line)
        return {a2b_base64(token): int(rank) for token, rank in lines}

    @cached_property
    def engine(self) -> Any:
        """The engine of tiktoken."""
        import tiktoken

        return tiktoken.Encoding(
            self.path.name,
            pat_str=LLAMA3_PATTERN,
            mergeable_ranks=self.ranks,
            special_tokens=self.special,
        )

    @without_gc()
    def speed_up(self) -> str:
        words = [token.decode(errors="replace") for token in self.ranks]
        self.fast, fault = judged(
            lambda: FastEngine(self.path, True), self.encode, [*self.special], words
        )
        return fault

    def encode(self, text: str) -> list[int]:
        _check_spaces(text)
        return list(self.engine.encode_ordinary(text))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.engine.decode([i for i in ids if i < self.base_size]))

    def token_bytes(self, token: int) -> bytes:
        return self.engine.decode_single_token_bytes(token) if token < self.base_size else b""

    def encode_documents(self, texts: Sequence[str]) -> list[Ids]:
        if self.fast is not None:
            return [self.fast.encode(text, self.encode) for text in texts]
        return [np.array(self.encode(text), np.uint32) for text in texts]

    def encode_after(self, texts: Sequence[str]) -> list[Ids]:
        return self.encode_documents(texts)

    def encode_rest(self, text: str) -> Ids:
        return self.encode_documents([text])[0]


def _check_spaces(text: str) -> None:
    """Raise DataError for more white space in a row than the engine encodes."""
    if len(text) > LONGEST_SPACE and any(len(s) > LONGEST_SPACE for s in SPACES.findall(text)):
        raise DataError(
            f"holds more than {LONGEST_SPACE} characters of white space in a row, which tiktoken "
            "cannot encode; shorten them"
        )
