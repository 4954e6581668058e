"""A run warns where the prompts of ``generate`` will begin otherwise than its documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny_run import config

import llamax
from llamax.inference.engine import begin_id, open_model

PREPARED = {"with": True, "without": False}


@pytest.mark.parametrize("documents", PREPARED)
@pytest.mark.parametrize("adds", [True, False])
def test_a_warning_follows_the_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], documents: str, adds: bool
) -> None:
    (tmp_path / "text.txt").write_text("def main(argv):\n    return len(argv) + 1\n" * 300)
    data = tmp_path / "first"
    llamax.prepare(tmp_path / "text.txt", data, train_tokenizer=300, validation=0.0)
    beside = {"add_bos_token": adds, "bos_token": "<s>", "eos_token": "</s>"}
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((data / "tokenizer.model").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(beside))
    data, run = tmp_path / "data", tmp_path / "run"
    bos = PREPARED[documents]
    llamax.prepare(tmp_path / "text.txt", data, tokenizer=folder, validation=0.0, bos=bos)
    settings = config(data, run)
    capsys.readouterr()
    model = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2}
    llamax.train(settings, model=model, run={"steps": 1})
    said = capsys.readouterr().err
    loaded = open_model(run)
    assert loaded.tokenizer.adds_bos == adds
    begins = begin_id(loaded, None)
    assert begins == (1 if adds else None)
    if bos == adds:
        assert "the model will be prompted with" not in said
        return
    use = "--bos" if bos else "--no-bos"
    names = ["BOS token 1", "no BOS token"]
    first, second = names if bos else names[::-1]
    assert (
        f"documents of {data} begin with {first}, but the model will be prompted with {second}; "
        f"generate and evaluate with {use}, or prepare the data with the other\n" in said
    )
    assert begin_id(loaded, bos) == (1 if bos else None)
