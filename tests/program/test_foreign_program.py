"""A run exported to NxD and imported again continues as if it had not been converted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.tiny_run import MODEL, STEPS, config, forget, hashes, log_of, make_dataset

from llamax.__main__ import dispatch
from llamax.checkpoint import Checkpoint
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.process import run_main
from llamax.train import train


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_that_came_back_from_nxd_goes_on_alike(
    tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset(tmp_path)
    cfg = config(dataset, tmp_path / "run", dtype=dtype)
    train(cfg, Rendezvous())
    whole, weights = log_of(tmp_path / "run"), hashes(tmp_path / "run", STEPS)
    forget(tmp_path / "run", 3)
    there, back = str(tmp_path / "nxd"), str(tmp_path / "back")
    assert run_main(dispatch, ["export", str(tmp_path / "run"), "--to", "nxd", "--out", there,
                          "--data", "3"]) == 0  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(MODEL.to_hub(dtype)))
    came = ["import", there, "--to", "llamax", "--out", back, "--config",
            str(tmp_path / "config.json"), "--consumed-sequences", "12"]  # fmt: skip
    assert run_main(dispatch, came) == 0
    assert "step 3" in capsys.readouterr().out
    assert Checkpoint(back).state == {"consumed_sequences": 12}
    again = replace(
        cfg,
        checkpoint=replace(cfg.checkpoint, resume=back),
        run=replace(cfg.run, folder=str(tmp_path / "again")),
    )
    train(again, Rendezvous())
    assert log_of(tmp_path / "again") == [r for r in whole if r["step"] > 3]
    name = "weights-tp00-dp00.safetensors"
    assert hashes(tmp_path / "again", STEPS)[name] == weights[name]


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, told in (
        (
            ["import", str(tmp_path), "--out", "x"],
            "is not a checkpoint of nxd, optimum, nemo, meta",
        ),
        (["import", str(tmp_path), "--out", "x", "--consumed-sequences", "-1"], "is below 0"),
        (["export", str(tmp_path), "--to", "nxd", "--out", "x"], "holds no model"),
    ):
        assert run_main(dispatch, argv) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
