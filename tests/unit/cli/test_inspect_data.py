"""``llamax inspect`` of token files and datasets."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from llamax.cli import inspect
from llamax.data.megatron import DTYPES, indexed_prefix
from llamax.runtime.errors import DataError
from llamax.runtime.files import sha256

DOCUMENTS = [[1, 5, 9, 2], [1, 7], [1, 300, 8, 8, 2]]


def index(lengths: list[int], width: int, code: int, marks: list[int] | None = None) -> bytes:
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


def write(prefix: Path, documents: list[list[int]], code: int = 4, modes: bytes = b"") -> Path:
    """A dataset of one sequence a document."""
    dtype = np.dtype(DTYPES[code])
    lengths = [len(document) for document in documents]
    flat = np.array([token for document in documents for token in document])
    prefix.with_name(f"{prefix.name}.bin").write_bytes(flat.astype(dtype).tobytes())
    idx = index(lengths, dtype.itemsize, code) + modes
    prefix.with_name(f"{prefix.name}.idx").write_bytes(idx)
    return prefix


def test_inspect_says_what_a_prefix_is(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d.v1", DOCUMENTS)
    for path in (prefix, Path(f"{prefix}.bin"), Path(f"{prefix}.idx")):
        found = dict(inspect.describe(path))
        assert found["Megatron data"] == prefix
        assert found["d.v1"] == "11 tokens, 3 documents, int32"
        assert found["tokenizer"] == "not named"
        assert "verified" not in found
    found = dict(inspect.describe(prefix, verify=True))
    assert found["verified"] == "that sequences lie end to end; the format keeps no checksums"


def test_inspect_says_what_prepare_made(tmp_path: Path) -> None:
    tokenizer, header = tmp_path / "tokenizer.model", {"vocab_size": 301}
    tokenizer.write_bytes(b"a tokenizer")
    said = {"tokenizer_file": tokenizer.name, "tokenizer": sha256(tokenizer), "key": "text"}
    (tmp_path / "dataset.json").write_text(json.dumps({**said, "indexed": header}))
    for split in ("train", "validation"):
        write(indexed_prefix(tmp_path, split, "text"), DOCUMENTS)
    found = dict(inspect.describe(tmp_path, verify=True))
    assert found["train"] == found["validation"] == "11 tokens, 3 documents, int32"
    assert (found["vocabulary"], found["tokenizer"]) == (301, sha256(tokenizer))
    assert str(found["files"]).startswith("4, ")
    assert "tokens are in the vocabulary" in str(found["verified"])
    write(indexed_prefix(tmp_path, "validation", "text"), [[7, 301]])
    with pytest.raises(DataError, match=r"token 301 .* is outside"):
        dict(inspect.describe(tmp_path, verify=True))
