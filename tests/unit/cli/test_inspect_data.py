"""``llamax inspect`` of token files and datasets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.megatron import DOCUMENTS, write_dataset

from llamax.data.dataset import read_index
from llamax.data.megatron import indexed_prefix
from llamax.runtime.errors import DataError
from llamax.runtime.files import sha256
from llamax.tools.inspect import description


def test_inspect_describes_a_prefix(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d.v1", DOCUMENTS)
    for path in (prefix, Path(f"{prefix}.bin"), Path(f"{prefix}.idx")):
        found = dict(description.describe(path))
        assert found["Megatron data"] == prefix
        assert found["d.v1"] == "11 tokens, 3 documents, int32"
        assert found["tokenizer"] == "not named"
        assert "verified" not in found
    found = dict(description.describe(prefix, verify=True))
    assert found["verified"] == "that sequences lie end to end; the format keeps no checksums"


def test_inspect_describes_a_dataset(tmp_path: Path) -> None:
    tokenizer, header = tmp_path / "tokenizer.model", {"vocab_size": 301}
    tokenizer.write_bytes(b"a tokenizer")
    said = {"tokenizer_file": tokenizer.name, "tokenizer": sha256(tokenizer), "key": "text"}
    (tmp_path / "dataset.json").write_text(json.dumps({**said, "indexed": header}))
    for split in ("train", "validation"):
        write_dataset(indexed_prefix(tmp_path, split, "text"), DOCUMENTS)
    for wrong in (
        {"key": "../text"},
        {"key": "a\0"},
        {"key": None},
        {"indexed": {"vocab_size": -1}},
    ):
        (tmp_path / "other.json").write_text(json.dumps({**said, "indexed": header, **wrong}))
        with pytest.raises(DataError, match=r"copy it again, or run llamax prepare again"):
            read_index(tmp_path / "other.json")
    found = dict(description.describe(tmp_path, verify=True))
    assert found["train"] == found["validation"] == "11 tokens, 3 documents, int32"
    assert (found["vocabulary"], found["tokenizer"]) == (301, sha256(tokenizer))
    assert str(found["files"]).startswith("4, ")
    assert "tokens are in the vocabulary" in str(found["verified"])
    write_dataset(indexed_prefix(tmp_path, "validation", "text"), [[7, 301]])
    with pytest.raises(DataError, match=r"token 301 .* is outside"):
        dict(description.describe(tmp_path, verify=True))
