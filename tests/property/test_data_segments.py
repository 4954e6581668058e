"""Our ids are sentencepiece's own ids, on real text and on text meant to break it."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.corpora import mistral, python_sources, train_unlike_llama

from llamax.data.tokenizer.fast_bpe import Segments, pattern
from llamax.data.tokenizer.sentencepiece_model import SentencePieceModel
from llamax.data.tokenizer.tokenizer import SentencePiece
from llamax.data.tokenizer.train import train_sentencepiece


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    korean = ["가나다 라마바 사아자 " * 20, "안녕하세요 반갑습니다 " * 20]
    return train_sentencepiece(python_sources(12) + korean, 1000, out)


@pytest.fixture(scope="module", params=["mistral", "trained"])
def tokenizer(request: pytest.FixtureRequest, trained: Path) -> SentencePiece:
    path = mistral() if request.param == "mistral" else trained
    tokenizer = SentencePiece(path, path.read_bytes())
    assert tokenizer.fast
    return tokenizer


def same(tokenizer: SentencePiece, texts: list[str], threads: int = 1) -> None:
    ours = tokenizer.encode_documents(texts, threads)
    own = tokenizer._engine.encode(texts)
    assert [ids.tolist() for ids in ours] == own


words = st.sampled_from(
    ["def", "self.x", "  ", "    ", " " * 17, " " * 300, "\n", "\n\n    ", "\t", "▁", "▁▁", "don't",
     "1234", "===", "--", "가나다", "日本語", "é", "e\u0301", "ß", "😀", "\u200b", "<s>", "<0x41>"]
)  # fmt: skip
# Lone surrogates are no text: nothing that was UTF-8 holds them.
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
ascii_text = st.text(st.characters(max_codepoint=127), max_size=60)
texts = st.lists(
    st.one_of(anything, ascii_text, st.lists(st.one_of(words, anything), max_size=12).map("".join)),
    max_size=8,
)


@given(texts=texts)
@example(texts=["", " ", "▁", "\0", "  a", "a  ", "a" * 5000, " " * 1000 + "x"])
@settings(max_examples=250)
def test_any_text(tokenizer: SentencePiece, texts: list[str]) -> None:
    same(tokenizer, texts)


@pytest.mark.parametrize("character", list(" \n\t-=#*_.\"'a0▁가"))
def test_runs_of_one_character(tokenizer: SentencePiece, character: str) -> None:
    same(
        tokenizer,
        [
            left + character * n + right
            for n in range(45)
            for left in ("", "x", " ")
            for right in ("", "y", "1")
        ],
    )


def test_python_sources(tokenizer: SentencePiece) -> None:
    same(tokenizer, python_sources(60), threads=2)


def test_real_text(tokenizer: SentencePiece, shared_data: Path) -> None:
    plays = (shared_data / "tinyshakespeare/input.txt").read_text(encoding="utf-8")
    korean = (shared_data / "korean_chatbot/ChatbotData.csv").read_text(encoding="utf-8")
    sums = (shared_data / "gsm8k/test.jsonl").read_text(encoding="utf-8")
    same(tokenizer, [plays[:200_000], *korean.splitlines()[:3000], *sums.splitlines()[:300]])


def test_threads_change_nothing(tokenizer: SentencePiece) -> None:
    texts = python_sources(8) * 2
    one, two = tokenizer.encode_documents(texts), tokenizer.encode_documents(texts, threads=2)
    assert [a.tolist() for a in one] == [b.tolist() for b in two]


def test_cuts_only_where_no_piece_crosses() -> None:
    """Letters that some piece joins are one segment; what none joins is apart."""
    cut = re.compile(pattern(["▁ab", "bc", "..", "▁é", "x"])).findall
    assert cut("  abcab..ab") == ["  abcab", "..", "ab"]
    assert cut("a1 é 1\nx x") == ["a", "1", " é", " ", "1", "\n", "x", " ", "x"]
    last = re.compile(pattern(["▁ab", ".."], runs_last=True)).findall
    assert last("   ab  ..") == [" ", " ", " ab", " ", " .."]


# ---- models for which the faster engine would not be exact


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "unigram"},
        {"byte_fallback": False},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"treat_whitespace_as_suffix": True},
        {"split_by_whitespace": False},
        {"user_defined_symbols": ["<tool>", "\n\n"]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_models_go_to_sentencepiece(tmp_path: Path, settings: dict[str, object]) -> None:
    path = train_unlike_llama(tmp_path, **settings)
    tokenizer = SentencePiece(path, path.read_bytes())
    assert not tokenizer.fast
    same(tokenizer, ["", "a  b <tool>\n\nx", *python_sources(3)])


def test_no_dummy_prefix_is_exact_too(tmp_path: Path) -> None:
    path = train_unlike_llama(tmp_path, add_dummy_prefix=False)
    tokenizer = SentencePiece(path, path.read_bytes())
    assert tokenizer.fast
    same(tokenizer, ["", " ", "a  b", "▁x", *python_sources(3)])


def _piece(text: str, score: float, kind: int) -> bytes:
    raw = text.encode()
    body = b"\x0a" + bytes([len(raw)]) + raw + b"\x15" + struct.pack("<f", score) + b"\x18"
    body += bytes([kind])
    return b"\x0a" + bytes([len(body)]) + body


@pytest.mark.parametrize(
    ("pieces", "exact"),
    [
        ([("ab", -1.0, 1), ("bc", -2.0, 1)], True),
        ([("ab", -1.0, 1), ("bc", -1.0, 1)], False),
        ([("ab", -1.0, 1), ("zyx", -2.0, 1)], False),
        ([("ab", -1.0, 1), ("bc", -2.0, 5)], False),
        ([("▁▁", -9.0, 1), ("▁▁▁", -9.0, 1), ("▁a", -2.0, 1)], True),
        ([("▁▁", -9.0, 1), ("▁▁▁", -9.0, 1), ("▁a", -10.0, 1)], False),
    ],
    ids=["distinct", "equal scores", "unreachable", "unused", "runs last", "runs first"],
)
def test_each_condition_is_checked(pieces: list[tuple[str, float, int]], exact: bool) -> None:
    """The proof's conditions, one at a time, on small hand-made vocabularies."""
    raw = _piece("<unk>", 0.0, 2)
    raw += b"".join(_piece(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256))
    raw += b"".join(_piece(*piece) for piece in pieces)
    raw += b"".join(_piece(c, -50.0 - i, 1) for i, c in enumerate("abcxyz▁"))
    raw += b"\x12\x05\x18\x02\x98\x02\x01" + b"\x1a\x04\x18\x01\x20\x00"
    found = Segments.of(SentencePieceModel.from_bytes(raw))
    assert (found is not None) == exact
    if found is not None:
        own = sentencepiece.SentencePieceProcessor(model_proto=raw)
        texts = ["abc bca", "   a    abc", "aab  bcc  "]
        assert [ids.tolist() for ids in found.encode(texts)] == own.encode(texts)
