"""``llamax consolidate`` and ``llamax shard``: what they print."""

from __future__ import annotations

from pathlib import Path

import pytest
import support.checkpoints as worlds
from support.corpora import train_unlike_llama
from support.saving import saved

from llamax.cli.consolidate import main as consolidate_main
from llamax.cli.shard import main as shard_main


def test_the_commands_print_what_they_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path, worlds.llama())
    out = tmp_path / "hub"
    assert consolidate_main([str(tmp_path), "--out", str(out), "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert f"{out}: 11.1K parameters of step 3, 21.7 KiB, in " in printed
    assert "no tokenizer was found for it; --tokenizer adds one" in printed
    unlike = train_unlike_llama(tmp_path, model_type="unigram")
    given = ["--out", str(tmp_path / "spoken"), "--tokenizer", str(unlike)]
    saved(tmp_path / "speaker", worlds.llama(vocabulary=600), tp=1)
    assert consolidate_main([str(tmp_path / "speaker"), *given]) == 0
    assert "its tokenizer.model has no exact tokenizer.json" in capsys.readouterr().out
    assert shard_main([str(out), "--out", str(tmp_path / "s"), "--tensor", "2"]) == 0
    assert "21.7 KiB of weights for tensor 2, in " in capsys.readouterr().out
