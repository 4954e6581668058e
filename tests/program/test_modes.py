"""Files and folders have the modes that the user's umask allows, no more and no less."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import tiny_run
from support.instruction import llama2_tokenizer

from llamax.cli import cache, consolidate, export, generate, plot, prepare, report, shard, train


@pytest.fixture
def mask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The umask of a test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o027, 0o077], indirect=True)
def test_all_that_is_written_has_the_modes_of_the_umask(tmp_path: Path, mask: int) -> None:
    out, config = tmp_path / "out", tmp_path / "config.toml"
    (tmp_path / "a.txt").write_text("A text of some words.\n" * 200)
    module = tmp_path / "compiled" / "neuronxcc-2.1" / "MODULE_1"
    module.mkdir(parents=True)
    for name in ("model.neff", "model.done"):
        (module / name).write_bytes(b"x")
    tokenizer = llama2_tokenizer(tmp_path)
    tiny_run.write(tiny_run.config(out / "tokens", out / "run"), config)
    run, hub = out / "run", out / "hub"
    steps = ["--run.steps=2", "--run.validate_every=1", "--run.tensorboard=true"]
    for command, words in (
        (prepare, [tmp_path / "a.txt", "--tokenizer", tokenizer, "--out", out / "tokens"]),
        (train, ["--config", config, *steps, "--model.vocab_size=600"]),
        (consolidate, [run, "--out", hub]),
        (shard, [hub, "--out", out / "shards"]),
        (export, [hub, "--out", out / "meta", "--to", "meta"]),
        (export, [hub, "--out", out / "nxd", "--to", "nxd", "--tensor", "2"]),
        (generate, [hub, "--prompt", "a", "--max-new-tokens", "1", "--out", out / "a.jsonl"]),
        (report, [run, "--out", out / "report.html"]),
        (plot, [run, "--out", out / "loss.png"]),
        (cache, ["push", "--cache", tmp_path / "compiled", "--place", out / "shared"]),
    ):
        assert command.main([str(word) for word in words]) == 0
    paths = [out, *out.rglob("*")]
    assert len(paths) > 40
    wrong = {
        f"{path.relative_to(tmp_path)} {mode:o}"
        for path in paths
        if (mode := path.lstat().st_mode & 0o7777) != (0o777 if path.is_dir() else 0o666) & ~mask
    }
    assert not wrong
