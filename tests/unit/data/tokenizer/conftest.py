"""Small tokenizers, trained once for each module."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.corpora import python_sources, train_byte_level

from llamax.data.tokenizer.train import train_sentencepiece as train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def spm(folder: Path) -> Path:
    return train(python_sources(10), 700, folder / "spm" / "tokenizer.model")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Path:
    return train_byte_level(folder / "small.tiktoken")


@pytest.fixture(autouse=True, scope="module")
def _folders(folder: Path) -> None:
    (folder / "spm").mkdir()
