"""checkpoint.also_hf is refused before the first step where its folder could not be written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import tiny_run

from llamax.config.schema import Config
from llamax.data.header import Header
from llamax.data.token_file import TokenWriter
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.data.tokenizer.train import train_sentencepiece
from llamax.runtime.errors import CheckpointError
from llamax.training.inputs import open_inputs


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ids below 61 of a tokenizer of 300 pieces: a model of 61 tokens can train on them."""
    folder = tmp_path_factory.mktemp("data")
    texts = [f"def name_{n}(x): return x + {n}" for n in range(200)]
    path = train_sentencepiece(texts, 300, folder / "tokenizer.model")
    (folder / "dataset.json").write_text(json.dumps({"tokenizer_file": path.name}))
    header = Header(load_tokenizer(path).fingerprint, 300)
    for name in ("train", "validation"):
        with TokenWriter(folder / f"{name}.tokens", header) as writer:
            writer.add(np.arange(200, dtype=np.uint16) % 61, np.array([200]), 200)
    return folder


def config(dataset: Path, run: Path, vocab_size: int, also_hf: bool) -> Config:
    plain = tiny_run.config(dataset, run)
    return replace(
        plain,
        model=replace(plain.model, vocab_size=vocab_size),
        checkpoint=replace(plain.checkpoint, also_hf=also_hf),
    )


def test_a_tokenizer_larger_than_the_vocabulary(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as refused:
        open_inputs(config(dataset, tmp_path, 61, also_hf=True))
    assert str(refused.value) == (
        f"the tokenizer of {dataset} has 300 tokens, the model's vocabulary is 61; consolidate "
        "with the model's tokenizer afterwards, without checkpoint.also_hf"
    )
    open_inputs(config(dataset, tmp_path, 61, also_hf=False))
    open_inputs(config(dataset, tmp_path, 300, also_hf=True))
