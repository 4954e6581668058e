"""Tokenizers exported to Hugging Face's format give equal ids."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from support.corpora import TEXTS, mistral, python_sources, train_unlike_llama

from llamax.cli.prepare import main as prepare
from llamax.data.tokenizer import hf_export
from llamax.data.tokenizer.hf_export import export_tokenizer
from llamax.data.tokenizer.hf_tokenizer import HuggingFace
from llamax.data.tokenizer.tiktoken_file import TikToken
from llamax.data.tokenizer.tokenizer import SentencePiece, load_tokenizer
from llamax.runtime.errors import DataError


def test_exported_sentencepiece_gives_equal_ids(spm: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for path, texts in ((spm, TEXTS + python_sources(20)), (mistral(), TEXTS + python_sources(20))):
        own = load_tokenizer(path)
        export_tokenizer(own, tmp_path / path.name, max_length=512)
        for kind in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
            hub = kind.from_pretrained(tmp_path / path.name)
            for text in texts:
                assert hub(text, add_special_tokens=False)["input_ids"] == own.encode(text)
                assert hub.decode(own.encode(text)) == own.decode(own.encode(text))
            assert (hub.bos_token_id, hub.eos_token_id) == (own.bos_id, own.eos_id)
            assert hub("x")["input_ids"] == [own.bos_id, *own.encode("x")]
            assert hub.model_max_length == 512
        assert load_tokenizer(tmp_path / path.name).fingerprint == own.fingerprint


def test_exported_sentencepiece_on_real_text(tmp_path: Path, shared_data: Path) -> None:
    own = load_tokenizer(mistral())
    export_tokenizer(own, tmp_path)
    hub = load_tokenizer(tmp_path / "tokenizer.json")
    korean = (shared_data / "korean_chatbot/ChatbotData.csv").read_text(encoding="utf-8")
    plays = (shared_data / "tinyshakespeare/input.txt").read_text(encoding="utf-8")
    for text in [plays[:50_000], *korean.splitlines()[:2000]]:
        assert hub.encode(text) == own.encode(text)


def test_exported_tiktoken_gives_equal_ids(ranks: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    own = load_tokenizer(ranks)
    export_tokenizer(own, tmp_path)
    hub = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS + python_sources(20):
        assert hub(text, add_special_tokens=False)["input_ids"] == own.encode(text)
        assert hub.decode(own.encode(text)) == text
    assert (hub.bos_token_id, hub.eos_token_id) == (own.bos_id, own.eos_id)


def test_exported_tokenizer_json_is_the_same_file(ranks: Path, tmp_path: Path) -> None:
    export_tokenizer(load_tokenizer(ranks), tmp_path / "a")
    own = load_tokenizer(tmp_path / "a" / "tokenizer.json")
    assert isinstance(own, HuggingFace)
    assert (own.bos_id, own.eos_id) == (load_tokenizer(ranks).bos_id, load_tokenizer(ranks).eos_id)
    export_tokenizer(own, tmp_path / "b")
    assert own.fingerprint == load_tokenizer(tmp_path / "b").fingerprint


def test_bos_and_eos_as_the_files_beside_say(ranks: Path, tmp_path: Path) -> None:
    export_tokenizer(load_tokenizer(ranks), tmp_path)
    config = {"bos_token": {"content": "<|step_id|>"}, "eos_token": "<|eot_id|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").unlink()
    own, first = load_tokenizer(tmp_path / "tokenizer.json"), load_tokenizer(ranks)
    assert own.bos_id == first.special["<|step_id|>"]
    assert own.eos_id == first.special["<|eot_id|>"]
    (tmp_path / "a.txt").write_text("one two three")
    text, out = str(tmp_path / "a.txt"), tmp_path / "out"
    prepare([text, "--tokenizer", str(tmp_path), "--out", str(out), "--validation", "0"])
    kept = load_tokenizer(out)
    assert (kept.bos_id, kept.eos_id) == (own.bos_id, own.eos_id)


@pytest.mark.parametrize(
    ("unlike", "reason"),
    [
        ({"model_type": "unigram"}, "is not a BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes text"),
        ({"remove_extra_whitespaces": True}, "removes extra spaces"),
        ({"treat_whitespace_as_suffix": True}, "puts spaces at the end of pieces"),
        ({"user_defined_symbols": ["return self"]}, "has user-defined pieces with spaces"),
        ({"byte_fallback": False}, "has no bytes to fall back on"),
    ],
)
def test_a_model_without_an_exact_twin_is_exported_alone(
    tmp_path: Path, unlike: dict[str, object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    own = load_tokenizer(train_unlike_llama(tmp_path, **unlike))
    export_tokenizer(own, tmp_path / "out")
    assert f"{own.path}: {reason}, which a tokenizer.json cannot reproduce, so only" in caplog.text
    assert "transformers 4 with use_fast=False make the ids of training" in caplog.text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tokenizer.model"]
    assert load_tokenizer(tmp_path / "out").fingerprint == own.fingerprint


def test_the_model_comes_before_its_conversions(spm: Path, ranks: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tiktoken").write_bytes(ranks.read_bytes())
    assert isinstance(load_tokenizer(tmp_path), TikToken)
    export_tokenizer(load_tokenizer(ranks), tmp_path / "x")
    (tmp_path / "tokenizer.json").write_bytes((tmp_path / "x/tokenizer.json").read_bytes())
    assert isinstance(load_tokenizer(tmp_path), HuggingFace)
    (tmp_path / "tokenizer.model").write_bytes(spm.read_bytes())
    export_tokenizer(load_tokenizer(spm), tmp_path / "y")
    (tmp_path / "tokenizer.json").write_bytes((tmp_path / "y/tokenizer.json").read_bytes())
    assert isinstance(load_tokenizer(tmp_path), SentencePiece)


SYMBOLS = ["[REF]", "[/REF]", "[REFERENCE_DOC_1]", "[REFERENCE_DOC_10]"]
PARTS = [*SYMBOLS, " ", "  ", "\n", "a", "the ", "Ünï", "漢", "[", "]", "REF", "_1", "return x"]


@pytest.mark.parametrize("name", ["240323.model.v3", "241114.model.v7", "trained"])
def test_user_defined_pieces_have_the_ids_of_sentencepiece(tmp_path: Path, name: str) -> None:
    """Mistral's models by mistral-common, and one trained here by sentencepiece."""
    transformers = pytest.importorskip("transformers")
    if name == "trained":
        import sentencepiece

        path = train_unlike_llama(tmp_path, user_defined_symbols=SYMBOLS)
        encode = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode
    else:
        module = pytest.importorskip("mistral_common.tokens.tokenizers.sentencepiece")
        path = mistral().with_name(f"mistral_instruct_tokenizer_{name}")
        judge = module.SentencePieceTokenizer(str(path))
        encode = lambda text: judge.encode(text, bos=False, eos=False)
    own = load_tokenizer(path)
    export_tokenizer(own, tmp_path / "out")
    hub = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    draw = random.Random(0)
    texts = ["".join(draw.choices(PARTS, k=draw.randint(1, 12))) for _ in range(500)]
    for text in [*TEXTS, *SYMBOLS, *PARTS, *python_sources(2), *texts]:
        assert own.encode(text) == encode(text), text
        assert hub(text, add_special_tokens=False)["input_ids"] == encode(text), text
    assert hub("x")["input_ids"] == [own.bos_id, *own.encode("x")]


def test_a_tekken_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "tekken.json"
    path.write_text('{"config": {"pattern": "a"}, "vocab": [{"rank": 0, "token_bytes": "AA=="}]}')
    with pytest.raises(DataError, match=r"tekken.json: is not a tokenizer \(it is a Tekken file"):
        load_tokenizer(path)
    with pytest.raises(DataError, match="it is a Tekken file, which only mistral-common reads"):
        load_tokenizer(tmp_path)


def test_unreachable_pieces_beside_user_defined_ones_have_no_twin(
    tmp_path: Path,
) -> None:
    own = load_tokenizer(train_unlike_llama(tmp_path, user_defined_symbols=SYMBOLS))
    assert isinstance(own, SentencePiece)
    model = own.model
    assert hf_export.why_no_twin(model) == ""
    last = max(n for n, (text, _, kind) in enumerate(model.pieces) if kind == 1 and len(text) > 2)
    text, score, kind = model.pieces[last]
    pieces = [*model.pieces]
    pieces[last] = (f"{text}\u0416", score, kind)  # no merge makes it
    assert hf_export.why_no_twin(replace(model, pieces=pieces)) == (
        "has user-defined pieces, and pieces that no text becomes"
    )
