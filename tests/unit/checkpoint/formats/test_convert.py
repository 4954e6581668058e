"""Import and export: the right format, unknown folders, refused exports."""

from __future__ import annotations

from pathlib import Path

import pytest
import support.checkpoints as worlds
import support.foreign as foreign
import support.foreign_megatron as foreign_megatron
import torch
from support.format_checks import check_hub, config_of, llama, saved

from llamax.checkpoint.formats.base import find_model_config
from llamax.cli.export import main as export_main
from llamax.cli.import_ import main as import_main
from llamax.config.load import load_config
from llamax.runtime.errors import CheckpointError, ConfigError


def test_export_hf_is_consolidate(tmp_path: Path) -> None:
    model = llama(2)
    values = worlds.wholes(model, torch.bfloat16)
    run = saved(tmp_path, model, values)
    assert export_main([run, "--to", "hf", "--out", str(tmp_path / "hub")]) == 0
    check_hub(tmp_path / "hub", values)
    with pytest.raises(ConfigError, match="is a Hugging Face folder already"):
        export_main([str(tmp_path / "hub"), "--to", "hf", "--out", str(tmp_path / "again")])


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (
            ["--to", "nxd", "--tensor", "3"],
            "=3 does not divide num_attention_heads=8, .*; use 1 or 2",
        ),
        (["--to", "nxd", "--tensor", "0"], "are 1 or more"),
        (["--to", "nxd", "--kv-multiplier", "3"], "makes 6 key/value heads.*; use a divisor of 4"),
        (
            ["--to", "nxd", "--pipeline", "3"],
            "=3 does not divide num_hidden_layers=2; use 1 or 2",
        ),
        (["--to", "nxd", "--qkv", "stacked"], "--qkv=stacked is for models"),
        (
            ["--to", "nxd", "--tensor", "4", "--qkv", "separate"],
            "=2 .by default .* needs --qkv=gqa",
        ),
        (
            ["--to", "nxd", "--optimizer", "zero1"],
            "does not hold the optimizer state of all weights",
        ),
        (["--to", "hf", "--tensor", "2"], "--tensor has no meaning for --to=hf"),
        (["--to", "meta", "--kv-multiplier", "2"], "--kv-multiplier has no meaning for --to=meta"),
        (
            ["--to", "meta", "--tensor", "4"],
            "=4 does not divide num_key_value_heads=2; use 1 or 2",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_exports_that_cannot_be(tmp_path: Path, argv: list[str], told: str) -> None:
    model = llama(2)
    folder = foreign_megatron.meta(tmp_path / "in", worlds.wholes(model), model)
    import_main([str(folder), "--out", str(tmp_path / "hub")])
    with pytest.raises((ConfigError, CheckpointError), match=told):
        export_main([str(tmp_path / "hub"), "--out", str(tmp_path / "out"), *argv])
    assert not (tmp_path / "out").exists()


def test_a_recipe_is_meant_although_a_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``make demo`` leaves one."""
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    Path("other").mkdir()
    assert find_model_config(tmp_path, "demo") == load_config("demo").model
    with pytest.raises(CheckpointError, match=r"cannot read other/config.json"):
        find_model_config(tmp_path, "other")


def test_the_wrong_configuration(tmp_path: Path) -> None:
    model, values = llama(2), worlds.wholes(llama(2), torch.bfloat16)
    tag = foreign.nxd(tmp_path / "in", values, model, 4, copies=2)
    out = ["--out", str(tmp_path / "out")]
    for other, told in (
        (llama(4, layers=3), "has no model.layers.2.input_layernorm.weight"),
        (llama(2, head_dim=8), "does not fit this model|is .*, the model's is"),
    ):
        with pytest.raises(CheckpointError, match=told):
            import_main([str(tag), *out, "--config", config_of(tmp_path, other)])
    with pytest.raises(ConfigError, match="does not describe its model; add --config"):
        import_main([str(tag), *out])
    copied = foreign_megatron.nemo(tmp_path / "nemo", values, model, 1)
    state = torch.load(copied / "model_weights.ckpt")
    for name in [*state]:
        if "query_key_value" in name:
            state[name] = state[name].repeat(2, 1)
    torch.save(state, copied / "model_weights.ckpt")
    with pytest.raises(CheckpointError, match="repeats key/value heads 2 times"):
        import_main([str(copied), *out, "--config", config_of(tmp_path, model)])


def test_folders_of_no_known_kind(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(CheckpointError, match="there is no folder"):
        import_main([str(tmp_path / "nowhere"), *out])
    with pytest.raises(CheckpointError, match="there is no folder"):
        import_main([str(tmp_path / "nowhere"), "--from", "meta", *out])
    with pytest.raises(CheckpointError, match="is not a checkpoint of nxd, optimum, nemo, meta"):
        import_main([str(tmp_path), *out])
    with pytest.raises(CheckpointError, match="has 0 files"):
        import_main([str(tmp_path), "--from", "nemo", *out])
    with pytest.raises(CheckpointError, match="it has no model folder and no complete tag"):
        import_main([str(tmp_path), "--from", "nxd", *out])
    model = llama(2)
    nemo = foreign_megatron.nemo(tmp_path / "nemo", worlds.wholes(model), model, 2, 2)
    (nemo / "tp_rank_01_pp_rank_001" / "model_weights.ckpt").unlink()
    (nemo / "tp_rank_01_pp_rank_001").rmdir()
    with pytest.raises(CheckpointError, match="no file of tensor rank 1, pipeline rank 1"):
        import_main([str(nemo), *out, "--config", config_of(tmp_path, model)])
