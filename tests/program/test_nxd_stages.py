"""A run of pipeline stages becomes NxD's files of stages, and comes back with equal bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from support.tiny_run import MODEL, config, make_dataset, torchrun, write

from llamax.checkpoint.formats.convert import import_checkpoint
from llamax.checkpoint.formats.export import export
from llamax.checkpoint.formats.nxd import find_rank_files
from llamax.checkpoint.reader import Checkpoint


def test_a_run_of_stages_becomes_files_of_stages_and_comes_back(tmp_path: Path) -> None:
    deep = dataclasses.replace(MODEL, num_hidden_layers=4, vocab_size=64)
    cfg = dataclasses.replace(config(make_dataset(tmp_path), tmp_path / "run"), model=deep)
    cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, steps=2))
    degrees = ("--parallel.pipeline=2", "--parallel.layers_per_stage=1,3")
    job = torchrun(2, write(cfg, tmp_path / "config.toml"), *degrees)
    _, stderr = job.communicate(timeout=300)
    assert job.returncode == 0, stderr
    for stages in (1, 2, 4):
        out, back = tmp_path / f"nxd{stages}", tmp_path / f"back{stages}"
        export(tmp_path / "run", out, to="nxd", tensor=2, pipeline=stages, data=2)
        (tag,) = (path.parent for path in out.glob("*/done"))
        assert find_rank_files(tag / "model").stages == stages
        assert find_rank_files(tag / "optim").stages == stages
        import_checkpoint(out, back, to="llamax", config=str(tmp_path / "config.toml"))
        before = Checkpoint(tmp_path / "run/checkpoints/step-00000002")
        after = Checkpoint(back)
        assert {*before.names()} == {*after.names()}
        for name in before.names():
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                assert torch.equal(before.read(name, kind), after.read(name, kind)), (name, kind)
