"""Small tokenizers, trained once for each module."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
import tokenizers
from support.corpora import python_sources

from llamax.data.tokenizer.hf_export import _byte_letters
from llamax.data.tokenizer.train import train_sentencepiece as train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def spm(folder: Path) -> Path:
    return train(python_sources(10), 700, folder / "spm" / "tokenizer.model")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Path:
    """A small byte-level BPE, its ranks in a tiktoken file."""
    engine = tokenizers.ByteLevelBPETokenizer()
    engine.train_from_iterator(python_sources(10), vocab_size=600, show_progress=False)
    letters = {c: b for b, c in enumerate(_byte_letters())}
    tokens = [bytes(letters[c] for c in t) for t in engine.get_vocab()]
    order = sorted(tokens, key=lambda t: (len(t) > 1, engine.get_vocab()[
        "".join(list(letters)[b] for b in t)]))  # fmt: skip
    path = folder / "small.tiktoken"
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(order)]
    path.write_bytes(b"".join(lines))
    return path


@pytest.fixture(autouse=True, scope="module")
def _folders(folder: Path) -> None:
    (folder / "spm").mkdir()
