"""Megatron's indexed files, written byte by byte."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from llamax.data.megatron import DTYPES

DOCUMENTS = [[1, 5, 9, 2], [1, 7], [1, 300, 8, 8, 2]]


def index_bytes(lengths: list[int], width: int, code: int, marks: list[int] | None = None) -> bytes:
    """An .idx file, spelled out."""
    marks = list(range(len(lengths) + 1)) if marks is None else marks
    pointers = np.cumsum([0, *lengths])[:-1] * width
    return (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(lengths), len(marks))
        + np.array(lengths, "<i4").tobytes()
        + pointers.astype("<i8").tobytes()
        + np.array(marks, "<i8").tobytes()
    )


def write_dataset(
    prefix: Path, documents: list[list[int]], code: int = 4, modes: bytes = b""
) -> Path:
    """A dataset of one sequence a document."""
    dtype = np.dtype(DTYPES[code])
    lengths = [len(document) for document in documents]
    flat = np.array([token for document in documents for token in document])
    prefix.with_name(f"{prefix.name}.bin").write_bytes(flat.astype(dtype).tobytes())
    idx = index_bytes(lengths, dtype.itemsize, code) + modes
    prefix.with_name(f"{prefix.name}.idx").write_bytes(idx)
    return prefix
