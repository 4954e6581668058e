"""A long text read in pieces is the text that a string holds."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamax.data.prepare import long_text
from llamax.data.prepare.file_kinds import decode
from llamax.data.prepare.long_text import LongText, digest, lines_of, pieces_of, read_text
from llamax.data.prepare.text_chunks import TextChunk, TextSettings, split_documents
from llamax.data.prepare.text_files import Source
from llamax.runtime.errors import DataError


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llamax.data.prepare.file_kinds.BLOCK_BYTES", 7)
        patch.setattr(long_text, "LONG_BYTES", 64)
        patch.setattr(long_text, "PIECE", 16)
        yield


@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=65))
def test_pieces_are_the_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("long") / "a.txt.gz"
    path.write_bytes(gzip.compress(text.encode()))
    found = read_text(str(path))
    assert isinstance(found, LongText)
    whole = decode(text.encode(), "a", 0)
    assert "".join(pieces_of(found)) == whole
    assert digest(found) == digest(whole), "the split of a document does not depend on its length"
    middle = LongText(str(path), 3, 40)
    assert "".join(middle.pieces()) == whole[3:40]


@pytest.mark.parametrize("text", ["word " * 300, "line of text\n" * 120, "x" * 2000], ids=len)
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_the_end_of_a_long_text_is_held_out_as_of_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, share: float
) -> None:
    monkeypatch.setattr("llamax.data.prepare.text_chunks.LEAST_HELD_OUT", 50)
    path = tmp_path / "a.txt"
    path.write_text(text)
    size = path.stat().st_size
    chunk = TextChunk((Source(str(path), 0, size, "v"),), only=True)
    settings = TextSettings("t", "text", share, True, True)
    parts = [
        ("".join(pieces_of(t)), held) for t, held in split_documents(chunk, settings, Counter())
    ]
    monkeypatch.setattr(long_text, "LONG_BYTES", 2**20)
    assert parts == list(split_documents(chunk, settings, Counter()))
    assert [held for _, held in parts] == [False, True]


def test_lines_are_whole_and_of_a_long_one_only_the_beginning_is_read() -> None:
    text = "short\n" + "y" * 100 + "\nend\nlast"
    lines = list(lines_of(text))
    assert "".join(lines).startswith("short\n" + "y" * 16)
    assert "".join(lines).endswith("end\nlast")
    assert len("".join(lines)) < len(text)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"a" * 100 + b"\xff", "byte 100 is not UTF-8 text (0xff)"),
        (b"a" * 100 + b"\0" + b"a", "byte 100 is not UTF-8 text (0x00)"),
        (b"a" * 100 + "é".encode()[:1], "byte 100 is not UTF-8 text (0xc3)"),
    ],
)
def test_a_byte_that_is_no_text_is_named(tmp_path: Path, raw: bytes, words: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(raw)
    with pytest.raises(DataError) as caught:
        list(pieces_of(read_text(str(path))))
    assert words in str(caught.value)
