"""Bytes packed in every way that ``prepare`` unpacks, by the ending of the file's name."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable

import zstandard

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": lambda raw: gzip.compress(raw, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda raw: zstandard.ZstdCompressor(write_checksum=True).compress(raw),
}


def packed(name: str, raw: bytes) -> bytes:
    """Bytes packed as the ending of a file's name says, in any case."""
    return next((pack(raw) for end, pack in PACK.items() if name.lower().endswith(end)), raw)
