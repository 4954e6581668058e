"""``llamax merge``: the folder it writes is the model that was tuned, within rounding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.adapters import MODEL, base_folder

from llamax.__main__ import dispatch
from llamax.checkpoint.build_model import load_tuned
from llamax.checkpoint.hf_folder import open_source
from llamax.checkpoint.merge import merge
from llamax.checkpoint.peft import PEFT_PREFIX, fingerprint
from llamax.checkpoint.slabs import SLAB_BYTES
from llamax.config.schema import FinetuneConfig
from llamax.model import lora
from llamax.model.llama import Llama
from llamax.runtime.errors import CheckpointError
from llamax.runtime.hub_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_JSON, SINGLE_FILE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, and adapters of it as ``adapters.export`` writes them."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("merge")
    base = base_folder(folder / "base")
    model = lora.adapt(Llama(MODEL), FinetuneConfig(r=4), torch.empty(0))
    generator = torch.Generator().manual_seed(3)
    tensors = {
        PEFT_PREFIX + name: torch.randn(p.shape, generator=generator) / 5
        for name, p in model.sharded_parameters().trained().tensors.items()
    }
    (folder / "adapter").mkdir()
    save_file(tensors, folder / "adapter" / ADAPTER_WEIGHTS)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": [*lora.LINEAR]}
    (folder / "adapter" / ADAPTER_CONFIG).write_text(json.dumps(settings))
    about = {"folder": str(base), "fingerprint": fingerprint(open_source(base))}
    (folder / "adapter" / BASE_JSON).write_text(json.dumps(about))
    return folder


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = model(ids)
    logits: torch.Tensor = getattr(found, "logits", found)
    return logits


def changed_base(
    folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]
) -> Path:
    """The base with a change of its tensors, for adapters that know no fingerprint."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder / "base", out / "base")
    shutil.copytree(folder / "adapter", out / "adapter")
    (out / "adapter" / BASE_JSON).unlink()
    tensors = load_file(out / "base" / SINGLE_FILE)
    change(tensors)
    save_file(tensors, out / "base" / SINGLE_FILE, {"format": "pt"})
    return out


NORM = "model.norm.weight"


@pytest.mark.parametrize("name", [NORM, "model.layers.0.self_attn.q_proj.weight"])
def test_numbers_that_are_not_finite_are_named(
    folder: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[3] = torch.nan

    changed_base(folder, tmp_path, change)
    out = merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
    assert caplog.messages == [
        f"{tmp_path}/base: {name} holds numbers that are not finite, which are copied: its "
        "training diverged or the files are damaged; use an earlier checkpoint"
    ]
    assert open_source(out).read(name).view(-1)[3].isnan()


def test_a_number_too_large_for_float16_is_refused(folder: Path, tmp_path: Path) -> None:
    """Written as float16 it would be infinite."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM][3] = 1e5

    changed_base(folder, tmp_path, change)
    given: dict[str, Any] = {"base": tmp_path / "base", "dtype": "float16"}
    with pytest.raises(CheckpointError, match=rf"{NORM} holds numbers beyond .*`dtype=bfloat16`"):
        merge(tmp_path / "adapter", tmp_path / "merged", **given)
    assert not (tmp_path / "merged").exists()
    merge(tmp_path / "adapter", tmp_path / "merged", **given | {"dtype": "bfloat16"})


@pytest.mark.parametrize(("name", "has"), [(NORM, "has no"), ("model.other.weight", "holds")])
def test_a_base_with_other_tensors_is_refused_by_its_configuration(
    folder: Path, tmp_path: Path, name: str, has: str
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if tensors.pop(name, None) is None:
            tensors[name] = torch.ones(3)

    changed_base(folder, tmp_path, change)
    with pytest.raises(CheckpointError, match=rf"{has} {name}: its config.json describes another"):
        merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")


@pytest.mark.parametrize("slab", [SLAB_BYTES, 1024], ids=["whole", "slabs"])
def test_merged_equals_unmerged(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slab: int
) -> None:
    """Also where a slab holds a few rows of a weight, and fewer than a row is a whole one."""
    monkeypatch.setattr("llamax.checkpoint.slabs.SLAB_BYTES", slab)
    out = merge(folder / "adapter", tmp_path / "merged", base=folder / "base")
    expected = logits_of(load_tuned(folder / "adapter"))
    theirs = transformers.LlamaForCausalLM.from_pretrained(out)
    assert (logits_of(theirs) - expected).abs().max() <= 1e-5 * expected.abs().max()
    base = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    assert (logits_of(base) - expected).abs().max() > 0.1 * expected.abs().max()


def test_merged_equals_what_peft_merges(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft, the judge of merging, is not installed")
    base = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    theirs = peft.PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    out = merge(folder / "adapter", tmp_path / "merged", base=folder / "base")
    source = open_source(out)
    for name, weight in theirs.state_dict().items():
        assert torch.allclose(source.read(name), weight, rtol=1e-6, atol=1e-6), name


def test_a_narrow_base_is_rounded_once(folder: Path, tmp_path: Path) -> None:
    narrow = tmp_path / "narrow"
    base = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    base.to(torch.bfloat16).save_pretrained(narrow)
    merged = open_source(merge(folder / "adapter", tmp_path / "merged", base=narrow))
    wide = merge(folder / "adapter", tmp_path / "wide", base=narrow, dtype=torch.float32)
    exact = open_source(wide)
    for name in merged.names():
        assert merged.dtype(name) == torch.bfloat16
        assert torch.equal(exact.read(name).bfloat16(), merged.read(name)), name
    assert json.loads((wide / "config.json").read_text())["dtype"] == "float32"


def test_the_command_prints_what_it_made(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = str(tmp_path / "out"), str(tmp_path / "other")
    assert dispatch(["merge", str(folder / "base"), str(folder / "adapter"), "--out", out]) == 0
    assert f"{out}: 262K parameters, 1.00 MiB, in " in capsys.readouterr().out
    assert dispatch(["merge", str(folder / "adapter"), "--out", other]) == 0
    weights = [(Path(f) / "model.safetensors").read_bytes() for f in (out, other)]
    assert weights[0] == weights[1]
    with pytest.raises(CheckpointError, match="exists already"):
        dispatch(["merge", str(folder / "base"), str(folder / "adapter"), "--out", out])


def test_merging_into_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    model.save_pretrained(other)
    with pytest.raises(CheckpointError, match="is an adapter of another base"):
        merge(folder / "adapter", tmp_path / "out", base=other)
    assert not (tmp_path / "out").exists()


def test_merging_into_another_shape_is_refused_without_a_fingerprint(
    folder: Path, tmp_path: Path
) -> None:
    config = transformers.LlamaConfig(**{**MODEL.to_hub("float32"), "intermediate_size": 128})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "thin")
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / BASE_JSON).unlink()
    with pytest.raises(CheckpointError, match=r"is \[128, 128\]; use the base it was trained on"):
        merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "thin")
    config = transformers.LlamaConfig(**{**MODEL.to_hub("float32"), "num_hidden_layers": 1})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "short")
    with pytest.raises(CheckpointError, match="is missing; use the base it was trained on"):
        merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "short")


@pytest.mark.parametrize(
    ("quantised", "line"),
    [
        ({"load_in_8bit": True}, r"quantised by bitsandbytes in 8 bits .* llamax does not read"),
        ({"load_in_4bit": True}, "states weights in 4 bits, but the files hold none"),
    ],
)
def test_a_quantised_base_is_refused(
    folder: Path, tmp_path: Path, quantised: dict[str, Any], line: str
) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    quantised = {"quant_method": "bitsandbytes", **quantised}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantised}))
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / BASE_JSON).unlink()
    with pytest.raises(CheckpointError, match=line):
        merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base")
    with pytest.raises(CheckpointError, match=line):
        load_tuned(tmp_path / "adapter", tmp_path / "base")


def test_progress_reaches_the_bytes_that_it_began_with(folder: Path, tmp_path: Path) -> None:
    totals, done = list[int](), list[int]()
    merge(folder / "adapter", tmp_path / "out", started=totals.append, progress=done.append)
    assert [sum(done)] == totals
    assert len(done) > 10
