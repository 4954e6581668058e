"""Checkpoints of other trainers, written by stand-ins, come back bit by bit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import support.checkpoints as worlds
import support.foreign as foreign
import torch

from llamax.__main__ import dispatch
from llamax.checkpoint import Checkpoint, load_owned
from llamax.checkpoint.formats.base import model_of
from llamax.checkpoint.formats.convert import open_folder
from llamax.checkpoint.formats.meta_writer import feed_forward
from llamax.checkpoint.hf_folder import HubFolder
from llamax.cli.export import main as export_main
from llamax.cli.import_ import main as import_main
from llamax.config.load import dump_config, load_config
from llamax.config.model import ModelConfig, RopeScaling
from llamax.config.schema import Config, RunConfig
from llamax.runtime.errors import CheckpointError, ConfigError


def llama(kv: int = 2, tied: bool = False, layers: int = 2, **fields: Any) -> ModelConfig:
    """Heads as wide as Meta's, a vocabulary that 8 ranks divide."""
    return ModelConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=kv,
        vocab_size=40,
        tie_word_embeddings=tied,
        **{"max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, **fields},
    )


def config_of(tmp_path: Path, model: ModelConfig) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(model.to_hub("bfloat16")))
    return str(path)


def saved(
    tmp_path: Path,
    model: ModelConfig,
    values: worlds.Wholes,
    tp: int = 2,
    dp: int = 1,
    step: int = 3,
) -> str:
    """A run's folder with one checkpoint."""
    ranks = worlds.world(model, tp, dp, True, values, values["model.norm.weight", "weight"].dtype)
    text = dump_config(Config(model=model, run=RunConfig(steps=9)))
    worlds.save(tmp_path / "run" / "checkpoints", model, ranks, step, config_text=text)
    return str(tmp_path / "run")


def check_hub(folder: Path, values: worlds.Wholes) -> None:
    source = HubFolder(folder)
    wanted = {name: value for (name, kind), value in values.items() if kind == "weight"}
    assert set(source.names()) == set(wanted)
    for name, value in wanted.items():
        found = source.read(name)
        assert found.dtype == value.dtype
        assert torch.equal(found, value), name


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
        load_owned(Checkpoint(out), rank.owned, rank.shards, 2, rank.axes.tp.rank)
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
    with pytest.raises(CheckpointError, match="step_3 has no file 'done'"):
        open_folder(tag, "nxd", config)


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
        (("kv",), "repeated 3 times, the shards hold 4"),
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
    folder = foreign.nemo(tmp_path / "in", values, model, **options)
    config = config_of(tmp_path, model)
    assert import_main([str(folder), "--out", str(tmp_path / "hub"), "--config", config]) == 0
    check_hub(tmp_path / "hub", values)


@pytest.mark.parametrize(("kv", "ranks", "dim"), [(8, 1, 1), (8, 4, 1), (2, 2, 1), (2, 2, 0)])
def test_meta(tmp_path: Path, kv: int, ranks: int, dim: int) -> None:
    model = llama(kv)
    values = worlds.wholes(model, torch.bfloat16)
    folder = foreign.meta(tmp_path / "in", values, model, ranks, dim)
    assert import_main([str(folder), "--out", str(tmp_path / "hub")]) == 0
    check_hub(tmp_path / "hub", values)
    assert ModelConfig.from_hub(json.loads((tmp_path / "hub" / "config.json").read_text())) == model


def test_meta_rows_turn_as_ours_do() -> None:
    """Meta's complex rotation of neighbours and our rotation of halves give the same scores."""
    from llamax import ops

    heads, width, hidden, length = 2, 6, 12, 5
    q, k = torch.randn(2, heads * width, hidden, dtype=torch.float64)
    x = torch.randn(1, length, hidden, dtype=torch.float64)
    frequencies = ops.inverse_frequencies(width, 10_000.0, None)
    cos, sin = ops.rope_tables(torch.arange(length)[None], frequencies)
    ours = [
        ops.reference_rotate((x @ w.t()).unflatten(-1, (heads, width)), cos, sin) for w in (q, k)
    ]
    angles = torch.outer(torch.arange(length), frequencies.double())
    turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    theirs = []
    for w in (q, k):
        pairs = (x @ foreign.meta_rows(w, heads).t()).view(1, length, heads, width // 2, 2)
        theirs.append(torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(3))
    scores = [torch.einsum("bshe,bthe->bhst", *pair) for pair in (ours, theirs)]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)  # the tables are float32


# --- writing, and back ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv", "tied", "argv"),
    [
        (8, False, ["--tensor", "4"]),
        (2, True, ["--tensor", "8", "--data", "2"]),
        (2, False, ["--tensor", "2", "--pipeline", "2", "--data", "3", "--qkv", "separate"]),
        (4, False, ["--tensor", "4", "--kv-multiplier", "2", "--qkv", "gqa-fused", "--data", "2"]),
        (2, False, ["--tensor", "2", "--optimizer", "zero1"]),
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
    ("kv", "copies", "style"), [(8, 1, "stacked"), (2, 2, "gqa"), (2, 2, "gqa-fused")]
)
def test_what_is_written_is_what_nxd_writes(
    tmp_path: Path, kv: int, copies: int, style: str
) -> None:
    """File by file, tensor by tensor and number by number."""
    model, data, tensor = llama(kv), 3, 4
    values = worlds.wholes(model, torch.bfloat16)
    run = saved(tmp_path, model, values, step=7)
    argv = ["--to", "nxd", "--tensor", "4", "--data", "3", "--qkv", style]
    out = tmp_path / "ours"
    export_main([run, "--out", str(out), *argv, "--kv-multiplier", str(copies)])
    theirs = foreign.nxd(tmp_path / "theirs", values, model, tensor, 1, data, style, copies)
    files = [*theirs.glob("*/dp_rank*.pt"), theirs / "done", theirs / "checkpoint"]
    assert len(files) == 4 + 12 + 2
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
        same(a, b)


def same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert set(a) == set(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b


def test_float32_weights_are_their_own_masters(tmp_path: Path) -> None:
    model = llama(2)
    values = worlds.wholes(model)
    run = saved(tmp_path, model, values)
    export_main([run, "--to", "nxd", "--out", str(tmp_path / "nxd"), "--data", "2"])
    source = open_folder(tmp_path / "nxd", "auto", config_of(tmp_path, model))
    for name in source.shapes:
        assert torch.equal(source.whole(name, "master"), values[name, "weight"])


@pytest.mark.parametrize(("kv", "ranks", "tied"), [(8, 1, False), (8, 8, False), (2, 2, True)])
def test_meta_and_back(tmp_path: Path, kv: int, ranks: int, tied: bool) -> None:
    model = llama(kv, tied)
    values = worlds.wholes(model, torch.bfloat16)
    argv = [saved(tmp_path, model, values), "--to", "meta", "--tensor", str(ranks)]
    assert dispatch(["export", *argv, "--out", str(tmp_path / "meta")]) == 0
    config = config_of(tmp_path, model)
    back = ["import", str(tmp_path / "meta"), "--out", str(tmp_path / "hub")]
    assert dispatch([*back, *(["--config", config] if tied else [])]) == 0
    check_hub(tmp_path / "hub", values)
    if not tied:
        theirs = foreign.meta(tmp_path / "theirs", values, model, ranks)
        for path in theirs.glob("*.pth"):
            a, b = (torch.load(folder / path.name) for folder in (tmp_path / "meta", theirs))
            b.pop("rope.freqs")
            same(a, b)


def test_export_hf_is_consolidate(tmp_path: Path) -> None:
    model = llama(2)
    values = worlds.wholes(model, torch.bfloat16)
    run = saved(tmp_path, model, values)
    assert export_main([run, "--to", "hf", "--out", str(tmp_path / "hub")]) == 0
    check_hub(tmp_path / "hub", values)
    with pytest.raises(ConfigError, match="is a Hugging Face folder already"):
        export_main([str(tmp_path / "hub"), "--to", "hf", "--out", str(tmp_path / "again")])


@pytest.mark.parametrize("width", [32, 2048, 4096, 5120, 8192])
@pytest.mark.parametrize("wanted", [86, 87, 11008, 13824, 14336, 28672, 8192])
def test_feed_forward_as_meta_computes_it(width: int, wanted: int) -> None:
    multiple, factor = feed_forward(width, wanted)
    hidden = int(2 * (4 * width) / 3)
    if factor is not None:
        hidden = int(factor * hidden)
    assert multiple * ((hidden + multiple - 1) // multiple) == wanted


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--to", "nxd", "--tensor", "3"], "--tensor=3 does not divide num_attention_heads=8"),
        (["--to", "nxd", "--tensor", "0"], "are 1 or more"),
        (["--to", "nxd", "--kv-multiplier", "3"], "makes 6 key/value heads"),
        (["--to", "nxd", "--pipeline", "3"], "--pipeline=3 does not divide num_hidden_layers=2"),
        (["--to", "nxd", "--qkv", "stacked"], "--qkv=stacked is for models"),
        (
            ["--to", "nxd", "--tensor", "4", "--qkv", "separate"],
            "=2 .by default .* needs --qkv=gqa",
        ),
        (["--to", "nxd", "--optimizer", "zero1"], "holds no optimizer state of all weights"),
        (["--to", "hf", "--tensor", "2"], "--tensor has no meaning for --to hf"),
        (["--to", "meta", "--kv-multiplier", "2"], "--kv-multiplier has no meaning for --to meta"),
        (["--to", "meta", "--tensor", "4"], "--tensor=4 does not divide num_key_value_heads=2"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_exports_that_cannot_be(tmp_path: Path, argv: list[str], told: str) -> None:
    model = llama(2)
    folder = foreign.meta(tmp_path / "in", worlds.wholes(model), model)
    import_main([str(folder), "--out", str(tmp_path / "hub")])
    with pytest.raises((ConfigError, CheckpointError), match=told):
        export_main([str(tmp_path / "hub"), "--out", str(tmp_path / "out"), *argv])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"head_dim": 8}, "head_dim = hidden_size / heads"),
        ({"rope_scaling": RopeScaling(factor=4.0)}, "does not know this rope_scaling"),
    ],
)
def test_models_that_meta_does_not_have(tmp_path: Path, fields: dict[str, Any], told: str) -> None:
    model = llama(2, **fields)
    run = saved(tmp_path, model, worlds.wholes(model))
    with pytest.raises(ConfigError, match=told):
        export_main([run, "--to", "meta", "--out", str(tmp_path / "out")])


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
        ("shape", "is no part of this model"),
        ("dtype", "is torch.float32 on some rank and torch.bfloat16 on the first"),
        ("step", "its optimizer state is none of NxD's"),
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


def test_a_recipe_is_meant_although_a_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``make demo`` leaves one."""
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    Path("other").mkdir()
    assert model_of(tmp_path, "demo") == load_config("demo").model
    with pytest.raises(CheckpointError, match=r"cannot read other/config.json"):
        model_of(tmp_path, "other")


def test_the_wrong_configuration(tmp_path: Path) -> None:
    model, values = llama(2), worlds.wholes(llama(2), torch.bfloat16)
    tag = foreign.nxd(tmp_path / "in", values, model, 4, copies=2)
    out = ["--out", str(tmp_path / "out")]
    for other, told in (
        (llama(4, layers=3), "has no model.layers.2.input_layernorm.weight"),
        (llama(2, head_dim=8), "is no part of this model|is .*, the model's is"),
    ):
        with pytest.raises(CheckpointError, match=told):
            import_main([str(tag), *out, "--config", config_of(tmp_path, other)])
    with pytest.raises(ConfigError, match="does not say what model it holds; add --config"):
        import_main([str(tag), *out])
    copied = foreign.nemo(tmp_path / "nemo", values, model, 1)
    state = torch.load(copied / "model_weights.ckpt")
    for name in [*state]:
        if "query_key_value" in name:
            state[name] = state[name].repeat(2, 1)
    torch.save(state, copied / "model_weights.ckpt")
    with pytest.raises(CheckpointError, match="repeats key/value heads 2 times"):
        import_main([str(copied), *out, "--config", config_of(tmp_path, model)])


def test_meta_folders_that_say_too_little(tmp_path: Path) -> None:
    model, values = llama(2), worlds.wholes(llama(2), torch.bfloat16)
    folder = foreign.meta(tmp_path / "in", values, model, 2)
    params = json.loads((folder / "params.json").read_text())
    out = ["--out", str(tmp_path / "out")]
    (folder / "params.json").write_text(json.dumps(params | {"use_scaled_rope": True}))
    with pytest.raises(ConfigError, match="use_scaled_rope, but not by how much; add --config"):
        import_main([str(folder), *out])
    (folder / "params.json").write_text(json.dumps(params | {"dim": "32"}))
    with pytest.raises(ConfigError, match="dim is '32', no number"):
        import_main([str(folder), *out])
    (folder / "consolidated.00.pth").rename(folder / "consolidated.02.pth")
    with pytest.raises(CheckpointError, match=r"of ranks \[1, 2\]; they must count from 00"):
        import_main([str(folder), *out])


def test_folders_of_no_known_kind(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(CheckpointError, match="there is no folder"):
        import_main([str(tmp_path / "nowhere"), *out])
    with pytest.raises(CheckpointError, match="there is no folder"):
        import_main([str(tmp_path / "nowhere"), "--from", "meta", *out])
    with pytest.raises(CheckpointError, match="is no checkpoint of nxd, optimum, nemo, meta"):
        import_main([str(tmp_path), *out])
    with pytest.raises(CheckpointError, match="has 0 files"):
        import_main([str(tmp_path), "--from", "nemo", *out])
    with pytest.raises(CheckpointError, match="it has no model folder and no tag"):
        import_main([str(tmp_path), "--from", "nxd", *out])
    model = llama(2)
    nemo = foreign.nemo(tmp_path / "nemo", worlds.wholes(model), model, 2, 2)
    (nemo / "tp_rank_01_pp_rank_001" / "model_weights.ckpt").unlink()
    (nemo / "tp_rank_01_pp_rank_001").rmdir()
    with pytest.raises(CheckpointError, match="no file of tensor rank 1, pipeline rank 1"):
        import_main([str(nemo), *out, "--config", config_of(tmp_path, model)])
