"""The header of a token file: what made its tokens, and where its sections lie (``token_file``)."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llamax.runtime.errors import DataError
from llamax.runtime.json_reader import parse_object

MAGIC = b"llamax1\n"
HEADER_BYTES = 4096
BLOCK_BYTES = 2**20
REMEDY = "the file is damaged; copy it again, or make it again with llamax prepare"


@dataclass(frozen=True)
class Header:
    """The header of a token file: tokenizer, counts and the places of its sections.

    ``tokenizer`` is a sha256; ``bos_id`` and ``eos_id`` are None if documents do not begin or
    end with them; ``counted`` is the number of tokens in the loss, None if all are.
    """

    tokenizer: str
    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    checksums_crc32: int = 0
    sections: dict[str, tuple[int, int]] = field(default_factory=dict)
    counted: int | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The narrowest type for the vocabulary."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    def to_bytes(self) -> bytes:
        """The first HEADER_BYTES of the file."""
        text = json.dumps({"dtype": self.dtype.name, **asdict(self)})
        body = text.encode().ljust(HEADER_BYTES - len(MAGIC) - 4)
        return MAGIC + zlib.crc32(body).to_bytes(4, "little") + body

    @classmethod
    def from_bytes(cls, raw: bytes, path: Path) -> Header:
        """The header of the file ``path``; DataError if it is damaged or not a token file's."""
        if raw[: len(MAGIC)] != MAGIC:
            raise DataError(
                f"{path}: is not a token file (starts with {raw[: len(MAGIC)]!r}, not {MAGIC!r}); "
                "give a file made by llamax prepare"
            )
        crc, body = raw[len(MAGIC) : len(MAGIC) + 4], raw[len(MAGIC) + 4 :]
        if len(raw) != HEADER_BYTES or zlib.crc32(body) != int.from_bytes(crc, "little"):
            raise DataError(f"{path}: its header does not match its checksum: {REMEDY}")
        try:
            (found := parse_object(body)).pop("dtype")
            found["sections"] = {k: (start, size) for k, (start, size) in found["sections"].items()}
            header = cls(**found)
            consistent = header.is_consistent()
        except (ValueError, TypeError, KeyError, AttributeError):
            consistent = False
        if not consistent:
            raise DataError(f"{path}: its header contradicts itself: {REMEDY}")
        return header

    def is_consistent(self) -> bool:
        """Whether sections follow each other and have the sizes of their contents."""
        counts = (self.vocab_size, self.tokens, self.documents, self.text_bytes)
        ids = [n for n in (self.bos_id, self.eos_id, self.counted) if n is not None]
        numbers = [*counts, self.checksums_crc32, *ids, *sum(self.sections.values(), ())]
        if not all(type(n) is int and n >= 0 for n in numbers) or self.vocab_size < 1:
            return False
        sizes = {"tokens": self.tokens * self.dtype.itemsize, "documents": 8 * (self.documents + 1)}
        if self.counted is not None:
            sizes["counted"] = -(-self.tokens // 8)
        sizes["checksums"] = 4 * -(-(self.sections["checksums"][0] - HEADER_BYTES) // BLOCK_BYTES)
        end = HEADER_BYTES
        for name, size in sizes.items():
            start, found = self.sections[name]
            if start < end or found != size:
                return False
            end = start + size
        return isinstance(self.tokenizer, str) and self.sections.keys() == sizes.keys()
