"""Checkpoints of Meta's Llama, read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import support.checkpoints as worlds
import support.foreign_megatron as foreign_megatron
import torch
from support.format_checks import assert_same, check_hub, config_of, llama, saved

from llamax.__main__ import dispatch
from llamax.checkpoint.formats.meta_writer import feed_forward_params
from llamax.cli.export import main as export_main
from llamax.cli.import_ import main as import_main
from llamax.config.model import ModelConfig, RopeScaling
from llamax.runtime.errors import CheckpointError, ConfigError


@pytest.mark.parametrize(("kv", "ranks", "dim"), [(8, 1, 1), (8, 4, 1), (2, 2, 1), (2, 2, 0)])
def test_meta(tmp_path: Path, kv: int, ranks: int, dim: int) -> None:
    model = llama(kv)
    values = worlds.wholes(model, torch.bfloat16)
    folder = foreign_megatron.meta(tmp_path / "in", values, model, ranks, dim)
    assert import_main([str(folder), "--out", str(tmp_path / "hub")]) == 0
    check_hub(tmp_path / "hub", values)
    assert ModelConfig.from_hub(json.loads((tmp_path / "hub" / "config.json").read_text())) == model


def test_meta_rows_turn_as_ours_do() -> None:
    """Meta's complex rotation of neighbours and our rotation of halves give the same scores."""
    from llamax import ops
    from llamax.model import rope

    heads, width, hidden, length = 2, 6, 12, 5
    q, k = torch.randn(2, heads * width, hidden, dtype=torch.float64)
    x = torch.randn(1, length, hidden, dtype=torch.float64)
    frequencies = rope.inverse_frequencies(width, 10_000.0, None)
    cos, sin = rope.rope_tables(torch.arange(length)[None], frequencies)
    ours = [
        ops.reference_rotate((x @ w.t()).unflatten(-1, (heads, width)), cos, sin) for w in (q, k)
    ]
    angles = torch.outer(torch.arange(length), frequencies.double())
    turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    theirs = []
    for w in (q, k):
        pairs = (x @ foreign_megatron.meta_rows(w, heads).t()).view(1, length, heads, width // 2, 2)
        theirs.append(torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(3))
    scores = [torch.einsum("bshe,bthe->bhst", *pair) for pair in (ours, theirs)]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)  # the tables are float32


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
        theirs = foreign_megatron.meta(tmp_path / "theirs", values, model, ranks)
        for path in theirs.glob("*.pth"):
            a, b = (torch.load(folder / path.name) for folder in (tmp_path / "meta", theirs))
            b.pop("rope.freqs")
            assert_same(a, b)


@pytest.mark.parametrize("width", [32, 2048, 4096, 5120, 8192])
@pytest.mark.parametrize("wanted", [86, 87, 11008, 13824, 14336, 28672, 8192])
def test_feed_forward_as_meta_computes_it(width: int, wanted: int) -> None:
    multiple, factor = feed_forward_params(width, wanted)
    hidden = int(2 * (4 * width) / 3)
    if factor is not None:
        hidden = int(factor * hidden)
    assert multiple * ((hidden + multiple - 1) // multiple) == wanted


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"head_dim": 8}, "head_dim = hidden_size / num_attention_heads"),
        ({"rope_scaling": RopeScaling(factor=4.0)}, "does not know this rope_scaling"),
    ],
)
def test_models_that_meta_does_not_have(tmp_path: Path, fields: dict[str, Any], told: str) -> None:
    model = llama(2, **fields)
    run = saved(tmp_path, model, worlds.wholes(model))
    with pytest.raises(ConfigError, match=told):
        export_main([run, "--to", "meta", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("factor", [None, 8.0, 32.0])
def test_the_rope_factor_of_the_reference_is_stated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float | None
) -> None:
    model = llama(2, rope_scaling=factor and RopeScaling(factor=factor))
    run = saved(tmp_path, model, worlds.wholes(model))
    assert export_main([run, "--to", "meta", "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().err.splitlines()
    stated = [line for line in lines if "fixes the rope scaling factor at 8, this model" in line]
    assert len(stated) == (factor == 32.0)
    assert all("this model's is 32" in line for line in stated)


def test_meta_folders_that_say_too_little(tmp_path: Path) -> None:
    model, values = llama(2), worlds.wholes(llama(2), torch.bfloat16)
    folder = foreign_megatron.meta(tmp_path / "in", values, model, 2)
    params = json.loads((folder / "params.json").read_text())
    out = ["--out", str(tmp_path / "out")]
    (folder / "params.json").write_text(json.dumps(params | {"use_scaled_rope": True}))
    with pytest.raises(ConfigError, match="use_scaled_rope, but not by how much; add --config"):
        import_main([str(folder), *out])
    (folder / "params.json").write_text(json.dumps(params | {"dim": "32"}))
    with pytest.raises(ConfigError, match="dim is '32', not a number"):
        import_main([str(folder), *out])
    (folder / "consolidated.00.pth").rename(folder / "consolidated.02.pth")
    with pytest.raises(CheckpointError, match=r"of ranks \[1, 2\]; they must count from 00"):
        import_main([str(folder), *out])
