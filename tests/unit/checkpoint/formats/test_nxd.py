"""Checkpoints of neuronx-distributed, read and written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import support.checkpoints as worlds
import support.foreign as foreign
import torch
from support.format_checks import assert_same, check_hub, config_of, llama, saved

from llamax.checkpoint import Checkpoint, load_owned
from llamax.checkpoint.formats.convert import open_folder
from llamax.cli.export import main as export_main
from llamax.cli.import_ import main as import_main
from llamax.config.model import ModelConfig
from llamax.config.schema import OptimConfig
from llamax.optim.schedule import lr_at
from llamax.runtime.errors import CheckpointError, ConfigError


def check_all(checkpoint: Checkpoint, values: worlds.Wholes, skip: tuple[str, ...] = ()) -> None:
    for (name, kind), value in values.items():
        if kind not in skip:
            assert torch.equal(checkpoint.read(name, kind), value), (name, kind)
    kept = {kind for _, kind in values} - {*skip}
    assert {*checkpoint.kinds("model.norm.weight")} == kept


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv", "tied", "options"),
    [
        (8, False, {"tp": 2, "style": "stacked"}),
        (8, True, {"tp": 4, "style": "separate"}),
        (2, False, {"tp": 2, "style": "gqa", "pp": 2}),
        (2, True, {"tp": 8, "style": "gqa-fused", "copies": 4}),
        (4, False, {"tp": 8, "style": "gqa", "copies": 2, "xser": True}),
        (4, False, {"tp": 4, "style": "gqa", "copies": 2}),
        (2, False, {"tp": 1, "style": "separate"}),
    ],
    ids=str,
)
def test_nxd_weights(tmp_path: Path, kv: int, tied: bool, options: dict[str, Any]) -> None:
    model = llama(kv, tied)
    values = worlds.wholes(model, torch.bfloat16)
    foreign.nxd(tmp_path / "in", values, model, **options)
    config = config_of(tmp_path, model)
    assert (
        import_main([str(tmp_path / "in"), "--out", str(tmp_path / "hub"), "--config", config]) == 0
    )
    check_hub(tmp_path / "hub", values)
    assert ModelConfig.from_hub(json.loads((tmp_path / "hub" / "config.json").read_text())) == model


@pytest.mark.parametrize(
    "options",
    [
        {"tp": 2, "dp": 2},
        {"tp": 2, "dp": 3, "pp": 2, "groups": 1},
        {"tp": 8, "dp": 2, "copies": 4, "style": "gqa-fused"},
        {"tp": 2, "dp": 2, "xser": True},
        {"tp": 2, "dp": 2, "xser": True, "drop_weights": True},
        {"tp": 2, "dp": 1, "masters": False},
        {"tp": 2, "dp": 2, "masters": False, "zero1": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_nxd_optimizer(tmp_path: Path, options: dict[str, Any], tied: bool) -> None:
    model = llama(2, tied)
    values = worlds.wholes(model, torch.bfloat16)
    if options.get("drop_weights"):  # NxD rounds the masters then
        for (name, kind), value in [*values.items()]:
            if kind == "master":
                values[name, "weight"] = value.bfloat16()
    tag = foreign.nxd(tmp_path / "in", values, model, **options)
    config, out = config_of(tmp_path, model), tmp_path / "step-00000007"
    assert import_main([str(tag), "--to", "llamax", "--out", str(out), "--config", config]) == 0
    checkpoint = Checkpoint(out)
    checkpoint.verify()
    assert checkpoint.step == 7
    check_all(checkpoint, values, () if options.get("masters", True) else ("master",))


def test_an_imported_optimizer_is_resumed_on_any_mesh(tmp_path: Path) -> None:
    model = llama(2)
    values = worlds.wholes(model, torch.bfloat16)
    tag = foreign.nxd(tmp_path / "in", values, model, 4, dp=2, copies=2)
    out = tmp_path / "out"
    import_main(
        [str(tag), "--to", "llamax", "--out", str(out), "--config", config_of(tmp_path, model)]
    )
    empty = worlds.world(model, 2, 2, True, None, torch.bfloat16)
    for rank in empty:
        load_owned(Checkpoint(out), rank.owned, rank.sharded)
    wanted = worlds.world(model, 2, 2, True, values, torch.bfloat16)
    for mine, theirs in zip(empty, wanted, strict=True):
        for a, b in zip(mine.owned, theirs.owned, strict=True):
            assert torch.equal(a.tensor, b.tensor), (a.name, a.kind)


def test_weights_only_leaves_the_optimizer_out(tmp_path: Path) -> None:
    model = llama(2)
    values = worlds.wholes(model, torch.bfloat16)
    tag = foreign.nxd(tmp_path / "in", values, model, dp=2)
    config = config_of(tmp_path, model)
    argv = [str(tag), "--to", "llamax", "--out", str(tmp_path / "out"), "--config", config]
    assert import_main([*argv, "--weights-only"]) == 0
    assert Checkpoint(tmp_path / "out").kinds("model.norm.weight") == ("weight",)


def test_the_newest_finished_tag_is_read(tmp_path: Path) -> None:
    model = llama(2)
    config = config_of(tmp_path, model)
    for step, seed in ((1, 1), (2, 2), (3, 3)):
        values = worlds.wholes(model, torch.bfloat16, seed)
        tag = foreign.nxd(tmp_path / "in", values, model, step=step)
        os.utime(tag / "done", (step, step))
    (tag / "done").unlink()
    source = open_folder(tmp_path / "in", "auto", config)
    assert source.folder.name == "step_2"
    assert source.origin == "tag step_2"
    assert open_folder(tmp_path / "in", "auto", config, step=1).folder.name == "step_1"
    with pytest.raises(CheckpointError, match="no tag step_4; its tags are step_1, step_2, step_3"):
        open_folder(tmp_path / "in", "nxd", config, step=4)


def test_a_named_tag_needs_no_done(tmp_path: Path) -> None:
    """NxD's converter writes none, and its loader asks for none when a tag is named."""
    model = llama(2)
    config = config_of(tmp_path, model)
    values = worlds.wholes(model, torch.bfloat16)
    for step in (1, 2):
        tag = foreign.nxd(tmp_path / "in", values, model, step=step)
        (tag / "done").unlink()
    for folder, step in ((tag, None), (tmp_path / "in", 2)):
        source = open_folder(folder, "auto", config, step=step)
        assert source.origin == "tag step_2, which has no file done"
        assert torch.equal(source.read("lm_head.weight"), values["lm_head.weight", "weight"])
    with pytest.raises(CheckpointError, match=r"no complete tag .*: step_1, step_2"):
        open_folder(tmp_path / "in", "nxd", config)
    with pytest.raises(CheckpointError, match="is the tag step_2, not step 1"):
        open_folder(tag, "nxd", config, step=1)
    tag.rename(tag.with_name("pretrained_weight"))
    (tmp_path / "in" / "step_1").rename(tmp_path / "elsewhere")
    source = open_folder(tmp_path / "in", "auto", config)
    assert source.origin == "tag pretrained_weight, which has no file done"
    (
        tmp_path / "in" / "pretrained_weight" / "model" / "dp_rank_00_tp_rank_01_pp_rank_00.pt"
    ).unlink()
    with pytest.raises(CheckpointError, match="give the configuration of exactly this model"):
        open_folder(tmp_path / "in", "auto", config).read("lm_head.weight")


# --- writing, and back ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv", "tied", "argv"),
    [
        (8, False, ["--tensor", "4"]),
        (2, True, ["--tensor", "8", "--data", "2"]),
        (2, False, ["--tensor", "2", "--pipeline", "2", "--data", "3", "--qkv", "separate"]),
        (4, False, ["--tensor", "4", "--kv-multiplier", "2", "--qkv", "gqa-fused", "--data", "2"]),
        (2, False, ["--tensor", "2", "--optimizer", "zero1"]),
        (2, False, ["--tensor", "2", "--pipeline", "2", "--data", "2", "--xser"]),
    ],
    ids=str,
)
def test_nxd_and_back(tmp_path: Path, kv: int, tied: bool, argv: list[str]) -> None:
    """checkpoint -> NxD -> checkpoint: every bit of weights, masters and moments."""
    model = llama(kv, tied)
    values = worlds.wholes(model, torch.bfloat16)
    run = saved(tmp_path, model, values, dp=2)
    there, back = str(tmp_path / "nxd"), str(tmp_path / "back")
    assert export_main([run, "--to", "nxd", "--out", there, *argv]) == 0
    config = config_of(tmp_path, model)
    assert import_main([there, "--to", "llamax", "--out", back, "--config", config]) == 0
    checkpoint = Checkpoint(back)
    assert checkpoint.step == 3
    check_all(checkpoint, values, ("master",) if "zero1" in argv else ())


@pytest.mark.parametrize(
    ("kv", "copies", "style", "stages"),
    [(8, 1, "stacked", 1), (2, 2, "gqa", 1), (2, 2, "gqa-fused", 1), (2, 2, "gqa", 2)],
)
def test_what_is_written_is_what_nxd_writes(
    tmp_path: Path, kv: int, copies: int, style: str, stages: int
) -> None:
    """File by file, tensor by tensor and number by number."""
    model, data, tensor = llama(kv), 3, 4
    values = worlds.wholes(model, torch.bfloat16)
    run = saved(tmp_path, model, values, step=7)
    argv = ["--to", "nxd", "--tensor", "4", "--data", "3", "--qkv", style]
    argv += ["--pipeline", str(stages)]
    out = tmp_path / "ours"
    export_main([run, "--out", str(out), *argv, "--kv-multiplier", str(copies)])
    theirs = foreign.nxd(tmp_path / "theirs", values, model, tensor, stages, data, style, copies)
    files = [*theirs.glob("*/dp_rank*.pt"), theirs / "done", theirs / "checkpoint"]
    assert len(files) == stages * (4 + 12) + 2
    for path in files:
        mine = out / "step_7" / path.relative_to(theirs)
        if path.suffix != ".pt":
            assert mine.read_text() == path.read_text()
            continue
        a, b = (torch.load(one, weights_only=False) for one in (mine, path))
        if path.parent.name == "model":
            b = {name: value for name, value in b.items() if not name.endswith("inv_freq")}
            assert [*a] == [*b], "in the order of NxD's own parameters"
        else:
            numbers = [group["params"] for group in b.pop("param_groups")]
            groups = a.pop("param_groups")
            assert [group["params"] for group in groups] == numbers
            assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        assert_same(a, b)


def test_xser_is_what_nxd_writes(tmp_path: Path) -> None:
    """File by file: the same references, tensors and shapes."""
    model = llama(2)
    values = worlds.wholes(model, torch.bfloat16)
    run = saved(tmp_path, model, values, step=7)
    argv = ["--to", "nxd", "--tensor", "2", "--data", "2", "--qkv", "gqa", "--xser"]
    export_main([run, "--out", str(tmp_path / "ours"), *argv])
    theirs = foreign.nxd(tmp_path / "theirs", values, model, 2, 1, 2, "gqa", xser=True)
    files = [*theirs.glob("*/dp_rank*.pt")]
    assert len([path for path in files if not path.name.endswith(".info.pt")]) == 2 + 4
    with foreign.torch_xla_serialization():

        def loaded(path: Path, folder: Path) -> Any:
            def filled(value: Any) -> Any:
                if type(value).__name__ == "TensorReference":
                    return torch.load(folder / f"tensor_{value.tid}.pt")
                if isinstance(value, dict):
                    return {key: filled(inner) for key, inner in value.items()}
                return value

            return filled(torch.load(path, weights_only=False))

        for path in files:
            if path.name.endswith(".info.pt"):
                continue
            ours = tmp_path / "ours" / "step_7" / path.relative_to(theirs)
            a, b = (loaded(one, one.with_name(one.name + ".tensors")) for one in (ours, path))
            for held in (a, b):
                held.pop("param_groups", None)
            b = {name: value for name, value in b.items() if not str(name).endswith("inv_freq")}
            assert_same(a, b)
            info = torch.load(ours.with_name(ours.name + ".info.pt"), weights_only=False)
            for number, entry in info.items():
                tensor = torch.load(ours.with_name(ours.name + ".tensors") / f"tensor_{number}.pt")
                assert (tensor.dtype, tensor.shape) == (entry["dtype"], entry["shape"])
                assert entry["expert_model_parallel"] is False


def test_schedulers_of_the_example_go_on(tmp_path: Path) -> None:
    """Both of its schedulers load scheduler.pt, and go on at the next step."""
    model = llama(2)
    run = saved(tmp_path, model, worlds.wholes(model, torch.bfloat16), step=7)
    out = tmp_path / "nxd"
    assert export_main([run, "--to", "nxd", "--out", str(out), "--tag", "pretrained_weight"]) == 0
    tag = out / "pretrained_weight"
    content = torch.load(tag / "user_content.pt")
    assert content == {"epoch": 0, "global_step": 7, "total_steps": 7, "batch_idx": 6}
    state = torch.load(tag / "scheduler.pt")
    groups = torch.load(tag / "optim" / "dp_rank_00_tp_rank_00_pp_rank_00.pt", weights_only=False)[
        "param_groups"
    ]
    optim = OptimConfig()
    assert {group["lr"] for group in groups} == {lr_at(8, optim, 9)}
    assert {group["initial_lr"] for group in groups} == {optim.lr}

    class Annealing(torch.optim.lr_scheduler.LRScheduler):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.max_steps = 100
            super().__init__(optimizer)

        def get_lr(self) -> list[float]:  # type: ignore[override]
            return [lr * (1 - self.last_epoch / self.max_steps) for lr in self.base_lrs]

    def linear(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100)

    for make in (Annealing, linear):
        two = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)]
        optimizer = torch.optim.AdamW(two, lr=1.0)
        scheduler = make(optimizer)
        scheduler.load_state_dict(state)
        optimizer.step()
        scheduler.step()
        assert scheduler.last_epoch == 8
        assert scheduler.get_last_lr() == pytest.approx([optim.lr * 0.92] * 2)


def test_options_of_nxd_are_checked(tmp_path: Path) -> None:
    model = llama(2)
    run = saved(tmp_path, model, worlds.wholes(model, torch.bfloat16))
    for tag in ("a/b", "..", "/"):
        with pytest.raises(ConfigError, match="is not the name of a folder"):
            export_main([run, "--to", "nxd", "--out", str(tmp_path / "out"), "--tag", tag])
    for option in (["--tag", "x"], ["--xser"]):
        with pytest.raises(ConfigError, match="has no meaning for"):
            export_main([run, "--to", "meta", "--out", str(tmp_path / "out"), *option])


def test_float32_weights_are_their_own_masters(tmp_path: Path) -> None:
    model = llama(2)
    values = worlds.wholes(model)
    run = saved(tmp_path, model, values)
    export_main([run, "--to", "nxd", "--out", str(tmp_path / "nxd"), "--data", "2"])
    source = open_folder(tmp_path / "nxd", "auto", config_of(tmp_path, model))
    for name in source.shapes:
        assert torch.equal(source.read(name, "master"), values[name, "weight"])


def damaged_nxd(tmp_path: Path, kind: str) -> tuple[Path, str]:
    model = llama(2)
    values = worlds.wholes(model, torch.bfloat16)
    tag = foreign.nxd(tmp_path / "in", values, model, 2, dp=0 if kind == "extra" else 2)
    weight = tag / "model" / "dp_rank_00_tp_rank_01_pp_rank_00.pt"
    optim = tag / "optim" / "dp_rank_01_tp_rank_00_pp_rank_00.pt"
    held = torch.load(weight)
    state = torch.load(optim, weights_only=False) if optim.exists() else {}
    if kind == "rank":
        weight.unlink()
        (tag / "model" / "dp_rank_00_tp_rank_02_pp_rank_00.pt").write_bytes(b"")
    if kind == "tensor":
        del held["model.layers.1.mlp.down_proj.weight"]
    if kind == "shape":
        held["model.layers.1.mlp.down_proj.weight"] = torch.ones(3, 4)
    if kind == "extra":
        other = tag / "model" / "dp_rank_00_tp_rank_00_pp_rank_00.pt"
        torch.save(torch.load(other) | {"model.vision.weight": torch.ones(2)}, other)
    if kind == "dtype":
        held["model.layers.1.mlp.down_proj.weight"] = held[
            "model.layers.1.mlp.down_proj.weight"
        ].float()
    if kind in ("tensor", "shape", "dtype"):
        torch.save(held, weight)
    if kind == "step":
        optim = tag / "optim" / "dp_rank_00_tp_rank_00_pp_rank_00.pt"
        state = torch.load(optim, weights_only=False)
        state["base_state"][0]["step"] = torch.ones(3)
        torch.save(state, optim)
    if kind == "moment":
        del state["base_state"][3]["exp_avg"]
        torch.save(state, optim)
    if kind in ("groups", "order"):
        optim = tag / "optim" / "dp_rank_00_tp_rank_00_pp_rank_00.pt"
        state = torch.load(optim, weights_only=False)
        if kind == "groups":
            state["param_groups"][0]["params"].pop()
        else:
            info = state["shape_info"]
            info[0], info[1] = info[1], info[0]
        torch.save(state, optim)
    return tag, config_of(tmp_path, model)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("rank", "has 2 rank files, data 1 x tensor 3 x pipeline 1 are 3"),
        ("tensor", "rank 1 of stage 0 has no model.layers.1.mlp.down_proj.weight"),
        ("shape", "does not fit this model"),
        ("dtype", "is torch.float32 on some rank and torch.bfloat16 on the first"),
        ("step", "its optimizer state is not NxD's"),
        ("extra", "has model.vision.weight, which llamax does not know"),
        ("moment", "the optimizer has no exp_avg of"),
        ("groups", "2 groups of 18 parameters, not one, or .* of 19"),
        ("order", "state 0 of the optimizer is"),
    ],
)
def test_damaged_nxd(tmp_path: Path, kind: str, told: str) -> None:
    tag, config = damaged_nxd(tmp_path, kind)
    argv = [str(tag), "--to", "llamax", "--out", str(tmp_path / "out"), "--config", config]
    with pytest.raises(CheckpointError, match=told):
        import_main(argv)
    assert not (tmp_path / "out").exists()
