"""Text and tokenizers that tests share: what every Python brings, and one Llama-style model."""

from __future__ import annotations

import base64
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from llamax.data.tokenizer.fast_settings import byte_letters


def python_sources(count: int | None = None) -> list[str]:
    """The text of the standard library's first ``count`` modules."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(folder.glob("*.py")) + sorted((folder / "email").glob("*.py"))
    return [path.read_text(encoding="utf-8") for path in paths[:count]]


def mistral() -> Path:
    """A real Llama-style sentencepiece model of 32,000 pieces; skips where there is none."""
    package = pytest.importorskip("mistral_common")
    return Path(package.__file__).parent / "data" / "tokenizer.model.v1"


def train_byte_level(path: Path) -> Path:
    """A small byte-level BPE, its ranks in a tiktoken file."""
    engine = tokenizers.ByteLevelBPETokenizer()
    engine.train_from_iterator(python_sources(10), vocab_size=600, show_progress=False)
    vocabulary = engine.get_vocab()
    letters = {letter: byte for byte, letter in enumerate(byte_letters())}
    spelled = {text: bytes(letters[letter] for letter in text) for text in vocabulary}
    order = sorted(spelled, key=lambda text: (len(text) > 1, vocabulary[text]))
    lines = [base64.b64encode(spelled[text]) + b" %d\n" % i for i, text in enumerate(order)]
    path.write_bytes(b"".join(lines))
    return path


def train_unlike_llama(folder: Path, **settings: Any) -> Path:
    """A small sentencepiece model with some settings of its own."""
    given: dict[str, Any] = {
        "vocab_size": 600,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        **settings,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in python_sources(5) for line in text.split("\n")),
        model_prefix=str(folder / "m"),
        minloglevel=2,
        **given,
    )
    return folder / "m.model"


TEXTS = [
    "",
    " ",
    "hello",
    "  two  spaces ",
    "tab\tand\n\n\nbreaks\r\n",
    "x = {'a': 1234}\n        return",
    "안녕하세요, 반갑습니다!",
    "日本語 é ß 😀 \u200b",
    "-----=====#####",
    "\n" + " " * 37 + "x",
    "a" * 300,
]
