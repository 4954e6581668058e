"""Long texts in pieces have the ids of the whole, in every family of tokenizers."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.corpora import mistral, python_sources, train_unlike_llama
from support.instruction import llama2_tokenizer
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers

from llamax.data.tokenizer import cuts
from llamax.data.tokenizer.hf_export import export_tokenizer
from llamax.data.tokenizer.llama3 import LLAMA3_PATTERN
from llamax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from llamax.runtime.errors import DataError

QWEN2 = LLAMA3_PATTERN.replace("{1,3}", "")


def engine(
    folder: Path, step: Any, normalizer: Any = None, added: tuple[str, ...] = (), **options: Any
) -> Path:
    """A tokenizer.json whose merges are learnt from Python's own sources."""
    made = tokenizers.Tokenizer(models.BPE(**options))
    if normalizer is not None:
        made.normalizer = normalizer
    if step is not None:
        made.pre_tokenizer = step
    texts = python_sources(5)
    if step is None:  # merges over spaces are many, and slow to learn from whole files
        texts = [line for text in texts for line in text.split("\n")][:2000]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=600, show_progress=False, initial_alphabet=alphabet, special_tokens=["<s>"]
        ),
    )
    made.add_tokens([AddedToken(name, normalized=False) for name in added])
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def split(pattern: str, prefix: bool = False) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
    )


def tiktoken(folder: Path) -> Path:
    """A file of ranks: bytes, and the pairs and triples of letters of some words."""
    words = [
        "the",
        "and",
        "def",
        "self",
        "return",
        "import",
        "",
        "\n\n",
        "==",
        "##",
        "가나다",
        "ing",
        "tion",
    ]
    tokens = [bytes([byte]) for byte in range(256)]
    for word in [*words, " the", " def", "  ", "    "]:
        raw = word.encode()
        tokens += [raw[:n] for n in range(2, len(raw) + 1) if raw[:n] not in tokens]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (folder / "t.tiktoken").write_text("\n".join(lines) + "\n")
    return folder / "t.tiktoken"


def with_added(folder: Path) -> Path:
    path = llama2_tokenizer(folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<tool>": 600}))
    return path


def converted(folder: Path, scheme: str = "", parts: bool = False) -> Path:
    """Llama 2's kind of tokenizer.json, with steps before the model or without them."""
    (folder / "m").mkdir()
    model = llama2_tokenizer(folder / "m")
    export_tokenizer(load_tokenizer(model), folder)
    (folder / "tokenizer.model").unlink()
    path = folder / "tokenizer.json"
    if scheme:
        made = tokenizers.Tokenizer.from_file(str(path))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=parts)
        path.write_text(json.dumps(json.loads(made.to_str()) | {"normalizer": None}))
    return path


SPACES = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
BYTES = pre_tokenizers.ByteLevel
MADE: dict[str, Callable[[Path], Path]] = {
    "llama 2": llama2_tokenizer,
    "llama 2, added": with_added,
    "mistral": lambda _: mistral(),
    "own engine": lambda f: train_unlike_llama(f, user_defined_symbols=["<sep>", "=="]),
    "no fallback": lambda f: train_unlike_llama(f, byte_fallback=False),
    "gpt2": lambda f: engine(f, BYTES(add_prefix_space=False)),
    "gpt2, added": lambda f: engine(f, BYTES(add_prefix_space=False), added=("<tool>", "==")),
    "gpt2, prefix": lambda f: engine(f, BYTES(add_prefix_space=True)),
    "llama 3": lambda f: engine(f, split(LLAMA3_PATTERN)),
    "llama 3, prefix": lambda f: engine(f, split(LLAMA3_PATTERN, True)),
    "qwen 2": lambda f: engine(f, split(QWEN2), normalizers.NFC()),
    "nemo": lambda f: engine(f, split(cuts.TEKKEN_PATTERN)),
    "tiktoken": tiktoken,
    "prepend": converted,
    "metaspace": lambda f: converted(f, "first"),
    "metaspace, split": lambda f: converted(f, "always", True),
}


@pytest.fixture(scope="module", params=list(MADE))
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    made = load_tokenizer(MADE[request.param](tmp_path_factory.mktemp("t")))
    assert made.cuts is not None
    return made


words = st.sampled_from(
    ["def", "self.x", " ", "  ", "    ", " " * 17, "\n", "\n\n    ", "\r\n", "\t", "▁", "▁▁",
     "don't", "'s", "1234", "===", "!\n", "!\n/", "--", "가나다", "日本語。", "é", "e\u0301",
     "\u0301", "ß", "😀", "\u200b", "\u3000", "\x1c", "\x85", "<s>", "<tool>", "<sep>", "<0x41>",
     "the ", "x"]
)  # fmt: skip
anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=10)
texts = st.lists(st.one_of(words, words, anything), min_size=1, max_size=40).map("".join)


def pieces(text: str, sizes: Iterator[int]) -> Iterator[str]:
    at = 0
    while at < len(text):
        size = next(sizes)
        yield text[at : at + size]
        at += size


@given(text=texts, size=st.integers(1, 30))
@example(text=" a" * 40, size=1)
@example(text="a  b\n\nc!\n\n/d\r\n\r\ne " * 9, size=2)
@example(text="x<tool> y <tool>z == ==  <s> a" * 5, size=3)
@settings(max_examples=150, deadline=None)
def test_pieces_have_the_ids_of_the_whole(tokenizer: Tokenizer, text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "PIECE", size)
        made = [*cuts.encode_in_pieces(tokenizer, pieces(text, iter(lambda: size, 0)), 2**20)]
    assert np.concatenate([piece.ids for piece in made]).tolist() == tokenizer.encode(text)
    assert sum(piece.text_bytes for piece in made) == len(text.encode())
    assert [piece.last for piece in made] == [False] * (len(made) - 1) + [True]


def test_every_family_is_cut(tokenizer: Tokenizer) -> None:
    """A property of pieces means nothing if there is only one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "PIECE", 50)
        text = "\n".join(python_sources(3))[:5000]
        made = [*cuts.encode_in_pieces(tokenizer, [text[:2500], text[2500:]], 2**20)]
    assert len(made) == 3
    assert np.concatenate([piece.ids for piece in made]).tolist() == tokenizer.encode(text)


UNKNOWN: dict[str, Callable[[Path], Path]] = {
    "unigram": lambda f: train_unlike_llama(f, model_type="unigram"),
    "rewrites": lambda f: train_unlike_llama(f, normalization_rule_name="nmt_nfkc"),
    "extra spaces": lambda f: train_unlike_llama(f, remove_extra_whitespaces=True),
    "pieces over spaces": lambda f: train_unlike_llama(f, split_by_whitespace=False),
    "spaces behind": lambda f: train_unlike_llama(f, treat_whitespace_as_suffix=True),
    "another pattern": lambda f: engine(f, split(r"\w+ |.")),
    "lower case": lambda f: engine(f, BYTES(), normalizers.Lowercase()),
    "words": lambda f: engine(f, pre_tokenizers.Whitespace(), unk_token="<s>"),
    "a token with a space": lambda f: engine(f, BYTES(), added=("a b",)),
    "merges over spaces": lambda f: engine(f, None, SPACES, unk_token="<s>"),
    "prepended, added": lambda f: engine(f, None, SPACES, ("<tool>",), unk_token="<s>"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_texts_are_whole_where_cuts_are_not_known(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(UNKNOWN[kind](tmp_path))
    assert tokenizer.cuts is None
    text = "def f(x):\n    return a b  \n" * 9
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "PIECE", 16)
        (made,) = cuts.encode_in_pieces(tokenizer, [text[:100], text[100:]], 2**20)
        assert made.ids.tolist() == tokenizer.encode(text)
        with pytest.raises(DataError, match=re.escape("without a place where this tokenizer")):
            [*cuts.encode_in_pieces(tokenizer, [text] * 99, 1000)]
