"""Tokenizers that the fast engine would read differently go to the engine that defines them."""

from __future__ import annotations

import base64
import json
import os
import struct
from pathlib import Path

import pytest
import sentencepiece
from support.corpora import mistral, python_sources, train_byte_level, train_unlike_llama

from llamax.data.prepare import pipeline
from llamax.data.prepare.file_kinds import kind_of
from llamax.data.prepare.row_range import RowRange
from llamax.data.prepare.text_chunks import TextChunk
from llamax.data.prepare.text_files import Source
from llamax.data.tokenizer import fast_engine
from llamax.data.tokenizer.fast_settings import Unsupported, of_engine, of_sentencepiece
from llamax.data.tokenizer.llama3 import LLAMA3_PATTERN
from llamax.data.tokenizer.sentencepiece_model import SentencePieceModel
from llamax.data.tokenizer.tiktoken_file import TikToken
from llamax.data.tokenizer.tokenizer import SentencePiece, load_tokenizer

pytest.importorskip("gigatoken")
from support.engine_pairs import judge_of, make_tokenizer


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"model_type": "unigram"}, "is not a BPE"),
        ({"byte_fallback": False}, "has no bytes to fall back on"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes text"),
        ({"remove_extra_whitespaces": True}, "removes extra spaces"),
        ({"treat_whitespace_as_suffix": True}, "puts spaces at the end of pieces"),
        ({"user_defined_symbols": ["<a tool>", "\n\n"]}, "has user-defined pieces with spaces"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_models_go_to_sentencepiece(
    tmp_path: Path, settings: dict[str, object], why: str
) -> None:
    path = train_unlike_llama(tmp_path, **settings)
    tokenizer = SentencePiece(path, path.read_bytes())
    assert tokenizer.speed_up() == why
    texts = ["", "a  b <a tool>\n\nx", *python_sources(3)]
    ours = tokenizer.encode_documents(texts)
    assert [ids.tolist() for ids in ours] == [*map(judge_of(path), texts)]


@pytest.mark.parametrize(
    "settings",
    [
        {"add_dummy_prefix": False},
        {"user_defined_symbols": ["<tool>", "\n\n"]},
        {"split_by_whitespace": False},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_models_unlike_llama_are_exact(tmp_path: Path, settings: dict[str, object]) -> None:
    path = train_unlike_llama(tmp_path, **settings)
    tokenizer = SentencePiece(path, path.read_bytes())
    assert tokenizer.speed_up() == ""
    texts = ["", " ", "a  b<tool> <tool>", "▁x", "a\n\n\nb\n\n <tool><tool>", *python_sources(6)]
    ours = tokenizer.encode_documents(texts)
    assert [ids.tolist() for ids in ours] == [*map(judge_of(path), texts)]


def _piece(text: str, score: float, kind: int) -> bytes:
    raw = text.encode()
    body = b"\x0a" + bytes([len(raw)]) + raw + b"\x15" + struct.pack("<f", score) + b"\x18"
    body += bytes([kind])
    return b"\x0a" + bytes([len(body)]) + body


@pytest.mark.parametrize(
    ("pieces", "why"),
    [
        ([("ab", -1.0, 1), ("bc", -2.0, 1)], ""),
        ([("ab", -1.0, 1), ("bc", -1.0, 1)], "has several pieces of one score"),
        ([("ab", -1.0, 1), ("zyx", -2.0, 1)], ""),
        ([("ab", -1.0, 1), ("bc", -2.0, 5)], "has unused pieces"),
        ([("▁▁", -9.0, 1), ("▁▁▁", -9.0, 1), ("▁a", -2.0, 1)], ""),
        ([("▁▁", -9.0, 1), ("▁▁▁", -9.0, 1), ("▁a", -10.0, 1)], ""),
    ],
    ids=["distinct", "equal scores", "unreachable", "unused", "runs last", "runs first"],
)
def test_each_condition_is_checked(
    pieces: list[tuple[str, float, int]], why: str, tmp_path: Path
) -> None:
    """On small hand-made vocabularies."""
    raw = _piece("<unk>", 0.0, 2)
    raw += b"".join(_piece(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256))
    raw += b"".join(_piece(*piece) for piece in pieces)
    raw += b"".join(_piece(c, -50.0 - i, 1) for i, c in enumerate("abcxyz▁"))
    raw += b"\x12\x05\x18\x02\x98\x02\x01" + b"\x1a\x04\x18\x01\x20\x00"
    tokenizer = SentencePiece(tmp_path / "t.model", raw)
    assert tokenizer.speed_up() == why
    own = sentencepiece.SentencePieceProcessor(model_proto=raw)
    texts = ["abc bca", "   a    abc", "aab  bcc  ", "zyx xyz", *(" " * n + "a" for n in range(30))]
    assert [ids.tolist() for ids in tokenizer.encode_documents(texts)] == own.encode(texts)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model": {"type": "Unigram"}}, "is not a BPE"),
        ({"model": {"new": 1}}, "has an unknown setting model.new"),
        ({"model": {"dropout": 0.1}}, "has model.dropout"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "has model.end_of_word_suffix"),
        ({"model": {"vocab": {"a": 0}}}, "lacks tokens of single bytes"),
        ({"normalizer": {"type": "NFC"}}, "normalizes text"),
        ({"pre_tokenizer": None}, "splits text by another pattern than those of GPT-2"),
        ({"pre_tokenizer": {**BYTE_LEVEL, "use_regex": False}}, "splits text by another pattern"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {
                            "type": "Split",
                            "pattern": {"Regex": LLAMA3_PATTERN},
                            "behavior": "Isolated",
                            "invert": True,
                        },
                        {**BYTE_LEVEL, "use_regex": False},
                    ],
                }
            },
            "splits text by another pattern",
        ),
        (
            {"added_tokens": [{"content": "<x>", "special": False, "rstrip": True}]},
            "has added tokens that depend on the text around them",
        ),
        ({"model": {"byte_fallback": True}}, "splits text in a way of its own"),
        (
            {"model": {"byte_fallback": True, "ignore_merges": False}, "pre_tokenizer": None},
            "has no bytes to fall back on",
        ),
        (
            {"model": {"byte_fallback": True, "ignore_merges": True}, "pre_tokenizer": None},
            "has model.ignore_merges",
        ),
        (
            {
                "model": {"byte_fallback": True},
                "pre_tokenizer": None,
                "normalizer": {"type": "Lowercase"},
            },
            "normalizes text",
        ),
    ],
)
def test_settings_that_the_engine_would_ignore(
    change: dict[str, dict[str, object]], why: str, tmp_path: Path
) -> None:
    value = json.loads(make_tokenizer("gpt2", tmp_path).read_text())
    assert of_engine(value)["model"] == value["model"]
    model = {**value["model"], **change.pop("model", {})}
    with pytest.raises(Unsupported, match=why):
        of_engine({**value, "model": model, **change})


def test_pieces_and_added_tokens_that_it_does_not_know() -> None:
    model = SentencePieceModel.from_bytes(mistral().read_bytes())
    assert of_sentencepiece(model, [])["model"]["type"] == "BPE"
    with pytest.raises(Unsupported, match="has added tokens in texts"):
        of_sentencepiece(model, ["<tool>"])


def test_an_engine_that_differs_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_tokenizer("tiktoken", tmp_path)
    tokenizer = load_tokenizer(path)
    ranks = path.read_bytes().splitlines()
    a, b = ranks[300].split()[0], ranks[301].split()[0]
    ranks[300:302] = [b + b" 300", a + b" 301"]  # the file changed after it was read
    path.write_bytes(b"\n".join(ranks) + b"\n")
    assert "gigatoken encodes" in (why := tokenizer.speed_up())
    assert "differently" in why
    path.write_bytes(
        b"\n".join([*ranks[:300], base64.b64encode(b"\xfe\xfd\xfc\xfb\xfa") + b" 300"])
    )
    assert tokenizer.speed_up().startswith("gigatoken cannot read it: ")
    monkeypatch.setattr(fast_engine, "find_spec", lambda name: None)
    assert tokenizer.speed_up() == "the package gigatoken is not installed"


@pytest.mark.parametrize(("name", "kib", "fast"), [
    ("a.txt", 1100, True), ("a.txt", 900, False), ("a.txt.gz", 300, True), ("a.txt.gz", 200, False),
    ("a.parquet", 300, True), ("a.arrow", 300, False),
])  # fmt: skip
def test_the_engine_is_loaded_for_inputs_that_hold_enough_text(
    tmp_path: Path, name: str, kib: int, fast: bool
) -> None:
    (path := tmp_path / name).touch()
    os.truncate(path, kib * 2**10)
    rows = RowRange(str(path), kind_of(path), 0, 1, 0, 1, "") if kind_of(path) else None
    source = rows or Source(str(path), 0, kib * 2**10, "")
    tokenizer = load_tokenizer(train_byte_level(tmp_path / "ranks.tiktoken"))
    assert isinstance(tokenizer, TikToken)
    pipeline._speed_up(tokenizer, [TextChunk((source,))])
    assert (tokenizer.fast is not None) == fast
