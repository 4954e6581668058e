"""Checkpoints of Meta's Llama, read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import support.checkpoints as worlds
import support.foreign as foreign
import torch

from llamax.__main__ import dispatch
from llamax.checkpoint.formats.meta_writer import feed_forward
from llamax.checkpoint.hf_folder import HubFolder
from llamax.cli.export import main as export_main
from llamax.cli.import_ import main as import_main
from llamax.config.load import dump_config
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


@pytest.mark.parametrize("width", [32, 2048, 4096, 5120, 8192])
@pytest.mark.parametrize("wanted", [86, 87, 11008, 13824, 14336, 28672, 8192])
def test_feed_forward_as_meta_computes_it(width: int, wanted: int) -> None:
    multiple, factor = feed_forward(width, wanted)
    hidden = int(2 * (4 * width) / 3)
    if factor is not None:
        hidden = int(factor * hidden)
    assert multiple * ((hidden + multiple - 1) // multiple) == wanted


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
