"""The bytes of single tokens make the text together, whatever the kind of tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tokenizer_kinds import kinds, write_kind

from llamax.data.tokenizer.tokenizer import load_tokenizer

TEXT = "The Elbe  is a river. Größe, été, 水. 🙂\n    return 'x'\n"


def joined(path: Path) -> str:
    tokenizer = load_tokenizer(path)
    return b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode(TEXT)).decode()


@pytest.mark.parametrize("name", [name for name in kinds() if name != "words"])
def test_of_a_tokenizer_json(name: str, tmp_path: Path) -> None:
    write_kind(name, tmp_path / "kind")
    assert joined(tmp_path / "kind") in (TEXT, f" {TEXT}")


def test_of_sentencepiece_and_tiktoken(spm: Path, ranks: Path) -> None:
    assert joined(spm) == f" {TEXT}"
    assert joined(ranks) == TEXT


def test_special_and_added_tokens(spm: Path, ranks: Path, tmp_path: Path) -> None:
    write_kind("metaspace, first", tmp_path / "kind")
    for path in (spm, ranks, tmp_path / "kind"):
        tokenizer = load_tokenizer(path)
        assert tokenizer.bos_id is not None
        assert tokenizer.token_bytes(tokenizer.bos_id) == b""
    write_kind("words", tmp_path / "words")
    words = load_tokenizer(tmp_path / "words")
    assert words.token_bytes(words.encode("Elbe")[0]) == b"Elbe"
