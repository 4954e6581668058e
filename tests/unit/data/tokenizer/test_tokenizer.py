"""SentencePiece, tiktoken and Hugging Face tokenizers."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import pytest
from support.corpora import TEXTS, python_sources

from llamax.data.tokenizer.hf_export import export_tokenizer
from llamax.data.tokenizer.sentencepiece_model import SentencePieceModel
from llamax.data.tokenizer.tokenizer import SentencePiece, TikToken, load_tokenizer
from llamax.data.tokenizer.tokenizer import train_sentencepiece as train
from llamax.runtime.errors import DataError


def test_sentencepiece(spm: Path) -> None:
    found = load_tokenizer(spm)
    assert isinstance(found, SentencePiece)
    assert (found.vocab_size, found.bos_id, found.eos_id) == (700, 1, 2)
    assert found.fingerprint == hashlib.sha256(spm.read_bytes()).hexdigest()
    for text in TEXTS:
        assert found.decode(found.encode(text)) == text


def test_training_is_llamas_recipe_and_repeatable(spm: Path, tmp_path: Path) -> None:
    again = train(python_sources(10), 700, tmp_path / "again.model")
    assert again.read_bytes() == spm.read_bytes()
    model = SentencePieceModel.from_bytes(spm.read_bytes())
    assert model.dummy_prefix
    assert not model.rewrites
    assert not model.drops_spaces
    encode = load_tokenizer(spm).encode
    assert len(encode("12345")) == len(encode("1")) + 4
    assert "▁▁" in {text for text, _, _ in model.pieces}


def test_too_little_text_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"^no tokenizer of 9000 pieces .* \(Vocab[^\[\].]*\); use "
    ):
        train(["a b c"], 9000, tmp_path / "x.model")
    assert list(tmp_path.iterdir()) == []


def test_tiktoken(ranks: Path) -> None:
    found = load_tokenizer(ranks)
    assert isinstance(found, TikToken)
    size = len(found.ranks)
    assert (found.bos_id, found.eos_id, found.vocab_size) == (size, size + 1, size + 256)
    for text in TEXTS:
        assert found.decode(found.encode(text)) == text
    named = "<|begin_of_text|>"
    assert found.bos_id not in found.encode(named)
    assert found.decode([found.bos_id, *found.encode("x")]) == "x"


def test_llama3_special_tokens(tmp_path: Path) -> None:
    lines = (base64.b64encode(i.to_bytes(1 if i < 256 else 3, "big")) for i in range(128_000))
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(line + b" %d\n" % i for i, line in enumerate(lines)))
    found = load_tokenizer(tmp_path)
    assert isinstance(found, TikToken)
    assert (found.bos_id, found.eos_id, found.vocab_size) == (128_000, 128_001, 128_256)
    assert found.special["<|eot_id|>"] == 128_009
    assert found.special["<|finetune_right_pad_id|>"] == 128_004
    assert found.special["<|reserved_special_token_246|>"] == 128_255


def test_every_kind_encodes_documents_as_it_encodes_one(
    spm: Path, ranks: Path, tmp_path: Path
) -> None:
    export_tokenizer(load_tokenizer(ranks), tmp_path)
    for path in (spm, ranks, tmp_path / "tokenizer.json"):
        found = load_tokenizer(path)
        for threads in (1, 2):
            many = found.encode_documents(TEXTS, threads)
            assert [ids.tolist() for ids in many] == [found.encode(text) for text in TEXTS]
        assert found.encode_documents([]) == []


@pytest.mark.parametrize(
    "raw",
    [b"", b"\0\1\2", b"{}", b'{"model": 3}', b"plain text\n", b"YQ== 0\nYQ== x\n",
     b"YQ== 0\nYg== 1\n", b"YQ== 7\n"],
)  # fmt: skip
def test_not_a_tokenizer(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(raw)
    with pytest.raises(DataError, match=r"tokenizer\.model: is not a tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_cut_model_is_refused(spm: Path, tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(spm.read_bytes()[:5001])
    with pytest.raises(DataError, match="is not a tokenizer"):
        load_tokenizer(tmp_path / "t.model")


def test_no_tokenizer_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "none")
