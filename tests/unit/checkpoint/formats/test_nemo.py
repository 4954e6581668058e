"""Checkpoints of NeMo."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.checkpoints as worlds
import support.foreign_megatron as foreign_megatron
import torch
from support.foreign_nnm import nnm
from support.format_checks import check_hub, config_of, llama

from llamax.cli.import_ import main as import_main
from llamax.runtime.errors import CheckpointError
from llamax.runtime.process import run_main


@pytest.mark.parametrize(
    ("kv", "options"),
    [
        (2, {"tp": 1}),
        (2, {"tp": 2}),
        (8, {"tp": 4, "pp": 2}),
        (2, {"tp": 2, "pp": 2, "core": True}),
        (2, {"tp": 2, "split_mlp": True, "pad": 24}),
        (2, {"tp": 2, "layout": "megatron"}),
        (8, {"tp": 2, "pp": 2, "layout": "megatron"}),
    ],
    ids=str,
)
def test_nemo(tmp_path: Path, kv: int, options: dict[str, Any]) -> None:
    model = llama(kv, layers=4)
    values = worlds.wholes(model, torch.bfloat16)
    folder = foreign_megatron.nemo(tmp_path / "in", values, model, **options)
    config = config_of(tmp_path, model)
    assert import_main([str(folder), "--out", str(tmp_path / "hub"), "--config", config]) == 0
    check_hub(tmp_path / "hub", values)


@pytest.mark.parametrize(
    ("kv", "options"),
    [
        (2, {"tp": 2}),
        (2, {"tp": 2, "gqa_qkv": True}),
        (2, {"tp": 2, "pp": 2, "xser": True}),
        (4, {"tp": 1, "gqa_qkv": True, "xser": True}),
        (2, {"tp": 4}),
        (2, {"tp": 4, "gqa_qkv": True}),
        (8, {"tp": 2, "pp": 2}),
        (2, {"tp": 2, "pp": 2, "vpp": 2}),
    ],
    ids=str,
)
def test_neuronx_nemo_megatron(tmp_path: Path, kv: int, options: dict[str, Any]) -> None:
    """Grouped heads, apart or fused, cut anywhere; stages and their chunks; xser."""
    model = llama(kv, layers=4)
    values = worlds.wholes(model, torch.bfloat16)
    folder = nnm(tmp_path / "in", values, model, **options)
    config = config_of(tmp_path, model)
    assert import_main([str(folder), "--out", str(tmp_path / "hub"), "--config", config]) == 0
    check_hub(tmp_path / "hub", values)


@pytest.mark.parametrize("xser", [False, True])
def test_one_of_several_steps(tmp_path: Path, capsys: Any, xser: bool) -> None:
    """The newest step that every rank has, or the one that is named; the report says which."""
    model = llama(2)
    config = config_of(tmp_path, model)
    by_step = {step: worlds.wholes(model, torch.bfloat16, step) for step in (9, 100, 250)}
    for step, values in by_step.items():
        nnm(tmp_path / "in", values, model, 2, step=step, xser=xser)
    ranks = [tmp_path / "in" / f"mp_rank_{rank:02d}" for rank in range(2)]
    (ranks[1] / "llmv2_converted_checkpoint--step=250.ckpt").unlink()
    for rank in ranks:
        newest = rank / "llmv2_converted_checkpoint--step=100.ckpt"
        (rank / "last.ckpt").write_bytes(newest.read_bytes())
        (rank / "llmv2_converted_checkpoint--step=100-last.ckpt").write_bytes(newest.read_bytes())

    def imported(name: str, *options: str) -> str:
        argv = [str(tmp_path / "in"), "--out", str(tmp_path / name), "--config", config]
        assert import_main([*argv, *options]) == 0
        return str(capsys.readouterr().out)

    report = imported("newest")
    assert "read step 100 (mp_rank_00/llmv2_converted_checkpoint--step=100.ckpt)" in report
    check_hub(tmp_path / "newest", by_step[100])
    assert "read step 9 (" in imported("ninth", "--step", "9")
    check_hub(tmp_path / "ninth", by_step[9])
    with pytest.raises(CheckpointError, match="no step 250 on every rank; every rank has 9, 100"):
        imported("out", "--step", "250")
    for step in (9, 100):
        (ranks[0] / f"llmv2_converted_checkpoint--step={step}.ckpt").unlink()
    (ranks[0] / "llmv2_converted_checkpoint--step=100-last.ckpt").unlink()
    with pytest.raises(CheckpointError, match="no step in common; every rank has none"):
        imported("out")
    copy = ranks[0] / "llmv2_converted_checkpoint--step=250.ckpt"
    copy.with_name("other--step=250.ckpt").write_bytes(copy.read_bytes())
    with pytest.raises(CheckpointError, match=r"2 files \*\.ckpt or \*\.pt of step 250, exactly"):
        imported("out")


def test_folders_of_megatron(tmp_path: Path, capsys: Any) -> None:
    """An iteration is taken by the tracker file or by --step; optimizers are left aside."""
    model = llama(2)
    config = config_of(tmp_path, model)
    root = tmp_path / "in"
    by_step = {step: worlds.wholes(model, torch.bfloat16, step) for step in (5, 40, 300)}
    for step, values in by_step.items():
        home = foreign_megatron.nemo(root / f"iter_{step:07d}", values, model, 2, layout="megatron")
        for rank in home.iterdir():
            torch.save({"optimizer": torch.ones(3)}, rank / "distrib_optim.pt")
            held = torch.load(rank / "model_optim_rng.pt")
            held["args"] = argparse.Namespace(num_layers=2, dtype=torch.bfloat16)
            held["rng_state"] = [{"np_rng_state": np.random.RandomState(1).get_state()}]
            torch.save(held, rank / "model_optim_rng.pt")

    def imported(name: str, *options: str, folder: Path = root) -> str:
        argv = [str(folder), "--out", str(tmp_path / name), "--config", config]
        assert import_main([*argv, *options]) == 0
        return str(capsys.readouterr().out)

    assert "read step 300 (iter_0000300/mp_rank_00/model_optim_rng.pt)" in imported("newest")
    (root / "latest_checkpointed_iteration.txt").write_text("40")
    assert "read step 40 (" in imported("tracked")
    check_hub(tmp_path / "tracked", by_step[40])
    assert "read step 5 (" in imported("fifth", "--step", "5")
    check_hub(tmp_path / "fifth", by_step[5])
    assert "read step 5 (" in imported("direct", folder=root / "iter_0000005")
    with pytest.raises(CheckpointError, match=r"no folder iter_0000006; its steps are 5, 40, 300"):
        imported("out", "--step", "6")
    with pytest.raises(CheckpointError, match=r"model_optim_rng\.pt is not of step 6 by its name"):
        imported("out", "--step", "6", folder=root / "iter_0000005")
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises(CheckpointError, match="no folder release"):
        imported("out")
    (root / "iter_0000005").rename(root / "release")
    assert "read mp_rank_00/model_optim_rng.pt" in imported("release")
    check_hub(tmp_path / "release", by_step[5])


def test_distributed_checkpoints_are_unsupported(tmp_path: Path) -> None:
    (tmp_path / "in" / "iter_0000005").mkdir(parents=True)
    (tmp_path / "in" / "iter_0000005" / "__0_0.distcp").write_bytes(b"")
    config = config_of(tmp_path, llama(2))
    for folder in (tmp_path / "in", tmp_path / "in" / "iter_0000005"):
        with pytest.raises(CheckpointError, match=r"torch\.distributed\.checkpoint, which llamax"):
            import_main([str(folder), "--out", str(tmp_path / "out"), "--config", config])


def test_chunks_of_ranks_agree(tmp_path: Path) -> None:
    model = llama(2, layers=4)
    folder = nnm(tmp_path / "in", worlds.wholes(model, torch.bfloat16), model, 2, vpp=2)
    path = folder / "mp_rank_01" / "llmv2_converted_checkpoint--step=1000.ckpt"
    held = torch.load(path)
    del held["model1"]
    torch.save(held, path)
    argv = [str(folder), "--out", str(tmp_path / "hub"), "--config", config_of(tmp_path, model)]
    with pytest.raises(CheckpointError, match="1 chunks of layers on tensor rank 1, 2 on rank 0"):
        import_main(argv)


def spoil(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of a rank's file."""
    held = torch.load(path)
    change(held)
    torch.save(held, path)


def damaged(folder: Path, damage: str) -> str:
    """Damage a tensor rank of a folder; returns the pattern of the error that importing raises."""
    first, second = (folder / f"mp_rank_0{rank}" / "model_weights.ckpt" for rank in range(2))
    embedding = "model.language_model.embedding.word_embeddings.weight"
    layer = "model.language_model.encoder.layers.0."
    dense, norm = f"{layer}self_attention.dense.weight", f"{layer}input_layernorm.weight"
    match damage:
        case "bit":
            content, held = bytearray(second.read_bytes()), torch.load(second)[dense]
            at = content.find(held.view(torch.uint8).numpy().tobytes())
            assert at > 0
            content[at + 5] ^= 4
            second.write_bytes(content)
            return r"model_weights\.ckpt: bytes \d+ to \d+ do not match their checksum; copy it"
        case "taller":
            spoil(first, lambda held: held.update({embedding: torch.cat([held[embedding]] * 2)}))
            return r"embeddings\.weight of shape \[40, 32\], \[20, 32\] on 2 tensor ranks"
        case "wider":
            spoil(second, lambda held: held.update({dense: held[dense].float()}))
            return r"o_proj\.weight \(weight\) is torch\.float32 on some rank and torch\.bfloat16"
        case "more":
            spoil(second, lambda held: held.update({f"{dense}s": held[dense]}))
            return r"has layers\.0\.self_attention\.dense\.weights, which llamax does not know"
        case "step":
            for step, path in ((10, first), (11, second)):
                torch.save({"state_dict": torch.load(path), "global_step": step}, path)
            return r"mp_rank_00/\S+ is of step 10 and mp_rank_01/\S+ of step 11; copy all files"
        case _:
            spoil(second, lambda held: held.update({norm: held[norm] * 2}))
            return ""


@pytest.mark.parametrize("damage", ["bit", "taller", "wider", "more", "step"])
def test_ranks_that_do_not_belong_together_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    """Each would be joined to a tensor of the right shape; nothing is left of the output."""
    model = llama(2)
    folder = tmp_path / "in"
    foreign_megatron.nemo(folder, worlds.wholes(model, torch.bfloat16), model, tp=2)
    told = damaged(folder, damage)
    config = config_of(tmp_path, model)
    arguments = [str(folder), "--out", str(tmp_path / "hub"), "--config", config]
    assert run_main(import_main, arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(told, line), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "in"]


def test_replicas_that_differ_and_numbers_that_are_not_finite_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was trained so is copied as it is."""
    model = llama(2)
    values = dict(worlds.wholes(model, torch.bfloat16))
    values["model.norm.weight", "weight"] = values["model.norm.weight", "weight"] * math.inf
    foreign_megatron.nemo(tmp_path / "in", values, model, tp=2)
    damaged(tmp_path / "in", "norm")
    config = config_of(tmp_path, model)
    assert (
        import_main([str(tmp_path / "in"), "--out", str(tmp_path / "hub"), "--config", config]) == 0
    )
    check_hub(tmp_path / "hub", values)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "layers.0.input_layernorm.weight has other values on some tensor rank" in said[0]
    assert "model.norm.weight (weight) holds numbers that are not finite" in said[1]
