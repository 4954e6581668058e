"""SentencePiece, tiktoken and Hugging Face tokenizers."""

from __future__ import annotations

import base64
import gc
import hashlib
import json
import shutil
import time
from pathlib import Path

import pytest
import tokenizers
from support.corpora import TEXTS, python_sources
from support.instruction import llama3_tokenizer

import llamax.data.tokenizer.tokenizer as tokenizer_module
from llamax.data.tokenizer.hf_export import export_tokenizer
from llamax.data.tokenizer.sentencepiece_model import SentencePieceModel
from llamax.data.tokenizer.tiktoken_file import LONGEST_SPACE, TikToken
from llamax.data.tokenizer.tokenizer import SentencePiece, load_tokenizer
from llamax.data.tokenizer.train import train_sentencepiece as train
from llamax.runtime.errors import DataError


def test_sentencepiece(spm: Path) -> None:
    found = load_tokenizer(spm)
    assert isinstance(found, SentencePiece)
    assert (found.vocab_size, found.bos_id, found.eos_id) == (700, 1, 2)
    assert found.fingerprint == hashlib.sha256(spm.read_bytes()).hexdigest()
    for text in TEXTS:
        assert found.decode(found.encode(text)) == text
    assert not {"_bare", "pieces"} & {*vars(found)}  # one engine, and no pieces beside it
    assert not any(isinstance(value, SentencePieceModel) for value in vars(found).values())


def test_a_worker_encodes_in_its_own_thread(spm: Path) -> None:
    found = load_tokenizer(spm)
    texts = python_sources(40)
    found.encode_after(texts[:1])
    own, whole = time.thread_time(), time.process_time()
    ids = found.encode_after(texts)
    own, whole = time.thread_time() - own, time.process_time() - whole
    assert own > whole / 2, f"{own:.3f} of {whole:.3f} s of CPU time"
    assert found.decode(ids[0].tolist()) == texts[0]


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
        DataError, match=r"^no tokenizer of 9000 pieces .* \(it has fewer .*\); use \d+ or fewer"
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
        many = found.encode_documents(TEXTS)
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


@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_beside_a_tokenizer_model(spm: Path, tmp_path: Path, special: bool) -> None:
    shutil.copy(spm, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 700, "<mark>": 701}))
    names = {"eos_token": "<|im_end|>", **({"pad_token": "<mark>"} if special else {})}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == 700
    assert (tokenizer.base_size, tokenizer.vocab_size) == (700, 702)
    assert tokenizer.named == names
    ids = tokenizer.encode("if x<mark>return<|im_end|>")
    assert (701 in ids) is not special
    assert 700 not in ids  # the name of a special token in a text is text
    assert tokenizer.decode(ids) == "if x<mark>return<|im_end|>"
    assert [list(part) for part in tokenizer.encode_documents(["if x<mark>return<|im_end|>"])] == [
        ids
    ]
    assert tokenizer.decode([700, *tokenizer.encode("if x"), 700]) == "if x"


def test_a_tokenizer_json_that_extends_the_model_comes_first(spm: Path, tmp_path: Path) -> None:
    export_tokenizer(load_tokenizer(spm), tmp_path)
    assert load_tokenizer(tmp_path).path.name == "tokenizer.model"
    engine = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    engine.add_special_tokens(["<|im_end|>"])
    engine.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.path.name == "tokenizer.json"
    assert tokenizer.special["<|im_end|>"] == 700


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_file_beside_a_tokenizer(spm: Path, tmp_path: Path, text: str) -> None:
    shutil.copy(spm, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("number", [-1, 2**24, 10**30])
def test_an_added_token_with_an_id_out_of_range(spm: Path, tmp_path: Path, number: int) -> None:
    shutil.copy(spm, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<mark>": number}))
    with pytest.raises(DataError, match=f"{number} is not the id of a token"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_json_with_an_id_out_of_range(tmp_path: Path) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 2**24}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": model}))
    with pytest.raises(DataError, match="16777216 is not the id of a token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["PanicException", "KeyboardInterrupt"])
def test_a_panic_of_an_engine_is_one_line_and_an_interrupt_is_not(
    spm: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*given: object) -> None:
        raise type(name, (BaseException,), {})("range end index 50")

    monkeypatch.setattr(tokenizer_module, "SentencePiece", fail)
    kind = DataError if name == "PanicException" else BaseException
    with pytest.raises(kind, match="range end index 50") as caught:
        load_tokenizer(spm)
    assert isinstance(caught.value, DataError) == (name == "PanicException")


@pytest.mark.parametrize(
    ("config", "adds"),
    [({}, True), ({"add_bos_token": False}, False), ({"add_bos_token": True}, True)],
)
def test_whether_a_tokenizer_adds_bos(
    spm: Path, tmp_path: Path, config: dict[str, bool], adds: bool
) -> None:
    shutil.copy(spm, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).adds_bos is adds


@pytest.mark.parametrize("template", [True, False], ids=["template", "no template"])
@pytest.mark.parametrize("setting", [True, False, None])
def test_a_setting_of_bos_that_the_template_contradicts_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, template: bool, setting: bool | None
) -> None:
    """transformers 5 ignores it, transformers 4 not: findings/transformers-add-bos-token.sh."""
    folder = llama3_tokenizer(tmp_path)
    for name, change in (
        ("tokenizer.json", {} if template else {"post_processor": None}),
        ("tokenizer_config.json", {"add_bos_token": setting}),
    ):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert load_tokenizer(folder).adds_bos is template
    begin = "begin with BOS" if template else "begin without BOS"
    line = f"add_bos_token={str(setting).lower()} beside it has no effect, as in transformers 5"
    contradicted = setting not in (None, template)
    assert (line in caplog.text and begin in caplog.text) == contradicted
    assert ("add_bos_token" in caplog.text) == contradicted


def test_more_white_space_than_tiktoken_encodes_is_one_line(ranks: Path) -> None:
    tokenizer = load_tokenizer(ranks)
    space = " " * LONGEST_SPACE
    assert tokenizer.decode(tokenizer.encode(f"{space}x")) == f"{space}x"
    for text in (f"{space} ", f"x {space}x", f"\u3000{space}"):
        with pytest.raises(DataError, match="holds more than 900000 characters of white space"):
            tokenizer.encode(text)
        with pytest.raises(DataError, match="holds more than 900000 characters of white space"):
            tokenizer.encode_documents(["x", text])


def test_garbage_is_not_looked_for_while_a_tokenizer_is_loaded(
    spm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = tokenizer_module.tokenizer_file

    def look(folder: Path) -> Path:
        seen.append(gc.isenabled())
        return real(folder)

    monkeypatch.setattr(tokenizer_module, "tokenizer_file", look)
    load_tokenizer(spm)
    assert seen == [False]


def test_garbage_is_looked_for_again_after_loading(spm: Path, tmp_path: Path) -> None:
    assert gc.isenabled()
    assert load_tokenizer(spm).speed_up() == ""
    assert gc.isenabled()
    (damaged := tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff")
    with pytest.raises(DataError):
        load_tokenizer(damaged)
    assert gc.isenabled()
    gc.disable()
    try:
        load_tokenizer(spm)
        assert not gc.isenabled()
    finally:
        gc.enable()
