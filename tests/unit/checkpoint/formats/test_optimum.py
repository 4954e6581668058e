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
