"""Checkpoints of optimum-neuron."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import support.checkpoints as worlds
import support.foreign as foreign
import torch
from support.format_checks import check_hub, llama

from llamax.checkpoint.formats.convert import open_folder
from llamax.cli.import_ import main as import_main
from llamax.runtime.errors import CheckpointError


@pytest.mark.parametrize(
    ("tp", "copies", "pp", "xser"), [(8, 4, 1, False), (4, 2, 2, True), (2, 1, 1, False)]
)
def test_optimum(tmp_path: Path, tp: int, copies: int, pp: int, xser: bool) -> None:
    model = llama(2)
    values = worlds.wholes(model, torch.float32)
    folder = foreign.optimum(tmp_path / "in", values, model, tp, copies, pp, xser)
    for given in (folder, folder / "shards"):
        out = tmp_path / f"hub-{given.name}"
        assert import_main([str(given), "--out", str(out)]) == 0
        check_hub(out, values)


def test_the_checkpoints_of_a_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest complete one, the one that is named, and the trained model beside them."""
    model, out = llama(2), tmp_path / "out"
    held = {}
    for number, step in enumerate((9, 10, 11)):
        values = {k: v + number for k, v in worlds.wholes(model, torch.float32).items()}
        foreign.optimum(out / f"checkpoint-{step}", values, model, 2, 1)
        held[step] = values
    (out / "checkpoint-11" / "shards" / "done").unlink()

    def read(folder: Path, expected: int, *more: str) -> str:
        hub = tmp_path / f"hub-{len(list(tmp_path.iterdir()))}"
        assert import_main([str(folder), "--out", str(hub), *more]) == 0
        check_hub(hub, held[expected])
        return capsys.readouterr().out

    assert "read checkpoint-10" in read(out, 10)
    assert "read checkpoint-9" in read(out, 9, "--step", "9")
    assert "read checkpoint-11, which has no file done" in read(out, 11, "--step", "11")
    assert "read checkpoint-9" in read(out / "checkpoint-9", 9, "--step", "9")
    for folder in (out, out / "checkpoint-9"):
        with pytest.raises(CheckpointError, match="has no checkpoint-12; its checkpoints are "):
            open_folder(folder, "auto", "", step=12)
    for step in (9, 10):
        (out / f"checkpoint-{step}" / "shards" / "done").unlink()
    with pytest.raises(CheckpointError, match=r"no complete checkpoint .*; name the folder of one"):
        open_folder(out)
    held[0] = {k: v - 1 for k, v in held[9].items()}
    foreign.optimum(out, held[0], model, 2, 1)
    read(out, 0)
    read(out, 9, "--step", "9")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            ("parameters", "model.layers.0.self_attn.o_proj.weight", "partition_dim"),
            "cut along dim 0, .* dim 1",
        ),
        (
            ("parameters", "model.norm.weight", "tensor_model_parallel"),
            "cut along dim None, .* no dim",
        ),
        (("kv",), "repeated 3 times, the shards repeat them 4 times"),
    ],
)
def test_optimum_metadata_that_disagrees(
    tmp_path: Path, change: tuple[str, ...], told: str
) -> None:
    model = llama(2)
    folder = foreign.optimum(tmp_path / "in", worlds.wholes(model), model, 8, 4)
    path = folder / "shards" / "mp_metadata_pp_rank_0.json"
    held = json.loads(path.read_text())
    if change == ("kv",):
        held["model_weight_transformation_specs"][1]["specs"][0][1]["kv_size_multiplier"] = 3
    else:
        held[change[0]][change[1]][change[2]] = True if "norm" in change[1] else 0
    path.write_text(json.dumps(held))
    with pytest.raises(CheckpointError, match=told):
        open_folder(folder, "auto", "")
