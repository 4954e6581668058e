"""Ids and texts of finished prompts: those of transformers for every kind of tokenizer."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import transformers
from support.instruction import llama2_tokenizer
from support.tokenizer_kinds import kinds, write_kind

from llamax.data.tokenizer.hf_export import export_tokenizer
from llamax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from llamax.inference import hub_tokenizer
from llamax.inference.hub_tokenizer import HubTokenizer

TEXTS = (
    *("", " ", "The Elbe", "  two  rivers ", "Größe 水 🙂", "a\n\nb", "it ' s . n't , one ?"),
    *("<|im_start|>user\nName <|im_end|> a", "</s> x </s>", "<s>one", "<|bot|>", "x <|eos|> y"),
)


@pytest.mark.parametrize("name", kinds())
def test_ids_and_texts_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    size = max(write_kind(name, tmp_path).get_vocab().values()) + 1
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = HubTokenizer(load_tokenizer(tmp_path))
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    for text in TEXTS:
        for special in (True, False):
            wanted = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, special) == wanted, text
    draw = random.Random(0)
    for _ in range(40):
        ids = [draw.randrange(size + 5) for _ in range(draw.randrange(12))]
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_a_sentencepiece_model_is_read_as_its_exported_folder(tmp_path: Path) -> None:
    original = load_tokenizer(llama2_tokenizer(tmp_path))
    export_tokenizer(original, tmp_path / "hub")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub")
    for files in (original, load_tokenizer(tmp_path / "hub")):
        ours = HubTokenizer(files)
        for text in TEXTS:
            ids = theirs.encode(text)
            assert ours.encode(text) == ids
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
            assert ours.decode(ids, False) == theirs.decode(ids)


def test_a_tokenizer_without_a_twin_finds_special_tokens_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer: Tokenizer = load_tokenizer(llama2_tokenizer(tmp_path))
    monkeypatch.setattr(hub_tokenizer, "why_no_twin", lambda model: "is unlike it")
    ours = HubTokenizer(tokenizer)
    bos, eos = tokenizer.special["<s>"], tokenizer.special["</s>"]
    assert ours.encode("") == [bos]
    assert ours.encode("", False) == []
    ids = ours.encode("import os</s>")
    assert ids[0] == bos
    assert ids[-1] == eos
    assert ids[1:-1] == tokenizer.encode("import os")
    assert ours.decode([*ids, 10**6]) == "import os"
    assert ours.decode(ids, False) == "<s>import os</s>"


def test_names_of_bos_and_eos_come_from_the_files(tmp_path: Path) -> None:
    write_kind("metaspace, first", tmp_path)
    config = tmp_path / "tokenizer_config.json"
    found = []
    for text in ({}, {"tokenizer_class": "LlamaTokenizerFast"}, {"eos_token": "<|im_end|>"}):
        config.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **text}))
        ours = HubTokenizer(load_tokenizer(tmp_path))
        found.append((ours.bos_id, ours.eos_id))
    end = load_tokenizer(tmp_path).special["<|im_end|>"]
    assert found == [(None, None), (1, 2), (None, end)]
    config.unlink()
    ours = HubTokenizer(load_tokenizer(tmp_path))
    assert (ours.bos_id, ours.eos_id) == (1, 2), "without files the usual names count"
