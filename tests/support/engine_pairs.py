"""Tokenizers and texts for the fast engine and the one that defines their ids."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from llamax.data.tokenizer.cuts import TEKKEN_PATTERN
from llamax.data.tokenizer.hf_export import export_tokenizer
from llamax.data.tokenizer.llama3 import LLAMA3_PATTERN
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.data.tokenizer.train import train_sentencepiece
from support.corpora import mistral, python_sources, train_byte_level

pytest.importorskip("gigatoken")


Judge = Callable[[str], list[int]]
KINDS = ["mistral", "mistral-v3", "trained", "tiktoken", "llama3", "qwen2", "tekken", "gpt2"]


class Pair:
    """A tokenizer of a kind, sped up, and the ids by the package that defines them."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        path = make_tokenizer(kind, folder)
        self.tokenizer = load_tokenizer(path)
        assert self.tokenizer.speed_up() == ""
        self.judge = judge_of(path)

    def check(self, texts: list[str]) -> None:
        ours = self.tokenizer.encode_documents(texts)
        assert [ids.dtype.name for ids in ours] == ["uint32"] * len(texts)
        for text, ids in zip(texts, ours, strict=True):
            assert ids.tolist() == self.judge(text), ascii(text[:80])


def make_tokenizer(kind: str, folder: Path) -> Path:
    if kind == "mistral":
        return mistral()
    if kind == "mistral-v3":
        return mistral().with_name("mistral_instruct_tokenizer_240323.model.v3")
    if kind == "trained":
        korean = ["가나다 라마바 사아자 " * 20, "안녕하세요 반갑습니다 " * 20]
        return train_sentencepiece(python_sources(12) + korean, 1000, folder / "tokenizer.model")
    if kind == "mistral-json":
        export_tokenizer(load_tokenizer(mistral()), folder)
        (folder / "tokenizer.model").unlink()
        return folder / "tokenizer.json"
    if kind == "metaspace":
        path = make_tokenizer("mistral-json", folder)
        value = json.loads(path.read_text())
        value["normalizer"] = None
        value["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        }
        path.write_text(json.dumps(value))
        return path
    ranks = train_byte_level(folder / "small.tiktoken")
    if kind == "tiktoken":
        return ranks
    export_tokenizer(load_tokenizer(ranks), folder)
    engine = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    patterns = {"qwen2": LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"), "tekken": TEKKEN_PATTERN}
    if kind in patterns:
        engine.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(patterns[kind]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    elif kind == "gpt2":
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    engine.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def judge_of(path: Path) -> Judge:
    """The ids of a text by the package that defines them, names of special tokens being text."""
    if path.suffix == ".json":
        hub = tokenizers.Tokenizer.from_file(str(path))
        hub.encode_special_tokens = True
        return lambda text: hub.encode(text, add_special_tokens=False).ids
    if path.suffix == ".tiktoken":
        lines = [line.split() for line in path.read_bytes().splitlines()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        encoding = tiktoken.Encoding(
            "judge", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        return encoding.encode_ordinary
    model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    return lambda text: list(model.encode(text))


words = st.sampled_from(
    ["def", "self.x", "  ", "    ", " " * 17, " " * 300, "\n", "\n\n    ", "\t", "▁", "▁▁", "don't",
     "1234", "===", "--", "가나다", "日本語", "é", "e\u0301", "ß", "😀", "\u200b", "<s>", "<0x41>",
     "[INST]", "<|eot_id|>", "'LL", "\u017f", "\r\n", "\u3000"]
)  # fmt: skip
# Lone surrogates are no text: nothing that was UTF-8 holds them.
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
ascii_text = st.text(st.characters(max_codepoint=127), max_size=60)
texts = st.lists(
    st.one_of(anything, ascii_text, st.lists(st.one_of(words, anything), max_size=12).map("".join)),
    max_size=8,
)
