"""Files and folders have the modes that the user's umask allows, no more and no less."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import tiny_run
from support.instruction import llama2_tokenizer

LLAMAX = [sys.executable, "-m", "llamax"]


def run(umask: int, *words: str | Path) -> None:
    done = subprocess.run(
        [*LLAMAX, *map(str, words)], umask=umask, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_all_that_is_written_has_the_modes_of_the_umask(tmp_path: Path, umask: int) -> None:
    out, config = tmp_path / "out", tmp_path / "config.toml"
    (tmp_path / "a.txt").write_text("A text of some words.\n" * 200)
    tokenizer = llama2_tokenizer(tmp_path)
    tiny_run.write(tiny_run.config(out / "tokens", out / "run"), config)
    run(umask, "prepare", tmp_path / "a.txt", "--tokenizer", tokenizer, "--out", out / "tokens")
    changes = ["--run.steps=2", "--run.validate_every=0", "--model.vocab_size=600"]
    run(umask, "train", "--config", config, *changes)
    run(umask, "consolidate", out / "run", "--out", out / "hub")
    run(umask, "shard", out / "hub", "--out", out / "shards")
    run(umask, "export", out / "hub", "--out", out / "meta", "--to", "meta")
    run(umask, "report", out / "run", "--out", out / "report.html")
    paths = [out, *out.rglob("*")]
    assert len(paths) > 30
    wrong = {
        f"{path.relative_to(tmp_path)} {mode:o}"
        for path in paths
        if (mode := path.lstat().st_mode & 0o7777) != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert not wrong
