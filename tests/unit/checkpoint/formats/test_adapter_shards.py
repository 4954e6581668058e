"""Adapters as optimum-neuron's trainer saves them, a file a rank: read as PEFT's, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.adapters import hub_folder
from support.foreign_adapters import optimum_adapter, share_factors
from support.models import LLAMA3

from llamax.checkpoint.build_model import load_tuned
from llamax.checkpoint.formats.convert import import_checkpoint
from llamax.checkpoint.hf_folder import open_source
from llamax.checkpoint.merge import merge
from llamax.checkpoint.peft import is_adapter, open_adapter
from llamax.runtime.errors import CheckpointError, ConfigError
from llamax.tools.inspect.description import describe, table
from llamax.tools.push.push import push

peft = pytest.importorskip("peft", reason="peft, the judge of LoRA, is not installed")
transformers = pytest.importorskip("transformers")

MESHES = {
    "one rank": {},
    "tensor 2": {"tp": 2},
    "tensor 2, pipeline 2": {"tp": 2, "pp": 2, "xser": True},
    "heads repeated": {"tp": 4, "copies": 2},
    "heads repeated, stacked": {"tp": 4, "copies": 2, "pp": 2, "fused": True, "xser": True},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and adapters of it that PEFT saved, with one A for each group of projections."""
    folder = tmp_path_factory.mktemp("trained")
    base = hub_folder(folder / "base", LLAMA3)
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    tuned = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(base), settings)
    generator = torch.Generator().manual_seed(1)
    state = {
        name: torch.randn(tensor.shape, generator=generator) / 5
        for name, tensor in peft.get_peft_model_state_dict(tuned).items()
    }
    peft.set_peft_model_state_dict(tuned, share_factors(state))
    tuned.save_pretrained(folder / "adapter")
    return folder


def shards(trained: Path, out: Path, **mesh: Any) -> Path:
    settings = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    whole = load_file(trained / "adapter" / "adapter_model.safetensors")
    return optimum_adapter(out, whole, settings, LLAMA3, **mesh)


@pytest.mark.parametrize("mesh", MESHES)
def test_shards_are_the_tensors_of_peft(trained: Path, tmp_path: Path, mesh: str) -> None:
    home = shards(trained, tmp_path / "out", name="poet-2", **MESHES[mesh])
    expected, _ = open_adapter(trained / "adapter")
    for place in (tmp_path / "out", home, home / "adapter_shards"):
        assert is_adapter(place)
        source, info = open_adapter(place)
        assert info.finetune.targets == "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
        assert {*source.names()} == {*expected.names()}
        for name in source.names():
            assert torch.equal(source.read(name), expected.read(name)), name
            part = source.read(name, dim=1, start=1, stop=3)
            assert torch.equal(part, expected.read(name)[:, 1:3]), name
    made = import_checkpoint(home, tmp_path / "peft")
    assert (made.origin, made.tensors) == ("out/adapter_poet-2", len(expected.names()))
    judge = peft.PeftModel.from_pretrained(
        transformers.LlamaForCausalLM.from_pretrained(trained / "base"), tmp_path / "peft"
    )
    ids = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(2))
    want = judge(ids).logits
    assert (load_tuned(home)(ids) - want).abs().max() <= 1e-5 * want.abs().max()
    merge(home, tmp_path / "merged")
    merge(trained / "adapter", tmp_path / "expected")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("merged", "expected")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_inspect_describes_them(trained: Path, tmp_path: Path) -> None:
    home = shards(trained, tmp_path / "out", tp=2, xser=True)
    for place in (tmp_path / "out", home):
        said = table([*describe(place)])
        assert "PEFT adapter" in said
        assert "LoRA of rank 4, alpha 6" in said
        assert "weight float32 x 28" in said


def test_the_newest_complete_checkpoint_of_the_trainer_is_taken(
    trained: Path, tmp_path: Path
) -> None:
    for step in (5, 10, 20):
        home = shards(trained, tmp_path / f"checkpoint-{step}", tp=2)
    (home / "adapter_shards" / "done").unlink()
    assert open_adapter(tmp_path)[0].folder == tmp_path / "checkpoint-10" / "adapter_default"
    made = import_checkpoint(tmp_path, tmp_path / "peft", step=5)
    assert made.origin == "checkpoint-5/adapter_default"
    with pytest.raises(CheckpointError, match=r"has no adapters of checkpoint-7; leave `step` out"):
        import_checkpoint(tmp_path, tmp_path / "other", step=7)
    shards(trained, tmp_path / "checkpoint-10", name="poet")
    with pytest.raises(CheckpointError, match=r"-10 has several adapters \(adapter_default, "):
        open_adapter(tmp_path)


def test_they_are_no_model(trained: Path, tmp_path: Path) -> None:
    home = shards(trained, tmp_path / "out")
    for place in (tmp_path / "out", home, home / "adapter_shards"):
        with pytest.raises(CheckpointError, match="holds adapters, not a model; merge them with"):
            open_source(place)
    with pytest.raises(ConfigError, match=r"`to=llamax`: .* holds adapters, which become a PEFT"):
        import_checkpoint(home, tmp_path / "new", to="llamax")
    with pytest.raises(CheckpointError, match=r"holds adapters in shards; first: llamax import"):
        push(home, "me/adapter")


@contextmanager
def changed(path: Path) -> Iterator[dict[str, Any]]:
    values = json.loads(path.read_text())
    yield values
    path.write_text(json.dumps(values))


def lose_metadata(home: Path) -> None:
    (home / "adapter_shards" / "mp_metadata_pp_rank_0.json").unlink()


def lose_a_rank(home: Path) -> None:
    next((home / "adapter_shards" / "model").glob("*tp_rank_01*")).unlink()


def lose_settings(home: Path) -> None:
    (home / "adapter_config.json").unlink()


def metadata(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(home: Path) -> None:
        with changed(home / "adapter_shards" / "mp_metadata_pp_rank_0.json") as values:
            change(values)

    return damage


def spec(key: str, value: object) -> Callable[[Path], None]:
    """A change of every spec that has the key."""

    def change(values: dict[str, Any]) -> None:
        for each in values["model_weight_transformation_specs"]:
            about = each["specs"][0][1]
            about |= {key: value} if key in about else {}

    return metadata(change)


def state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(home: Path) -> None:
        path = next((home / "adapter_shards" / "model").glob("*tp_rank_01*"))
        values = torch.load(path)
        change(values)
        torch.save(values, path)

    return damage


B = "base_model.model.model.layers.0.self_attn.qkv_proj.lora_B.weight_"
HEAD = "base_model.model.lm_head.weight"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose_metadata, r"rank_0\.json is missing: older .* neuron consolidate .*out PEFT`"),
        (lose_a_rank, "has 3 rank files"),
        (lose_settings, r"cannot read .*adapter_config\.json"),
        (metadata(dict.clear), "rank_0.json does not fit the tensors beside it, or describes them"),
        (metadata(lambda v: v.update(parameters=[])), "rank_0.json does not fit"),
        (metadata(lambda v: v["parameters"].clear()), "which its metadata does not describe; join"),
        (spec("tp_size", 8), r"rank_0\.json does not fit"),
        (spec("fuse_axis", 1), r"rank_0\.json does not fit"),
        (spec("original_dims", [3, 5]), r"rank_0\.json does not fit"),
        (spec("num_attention_heads", 0), r"rank_0\.json does not fit"),
        (spec("kv_size_multiplier", "x"), r"rank_0\.json does not fit"),
        (state(lambda v: v.pop(f"{B}q")), r"some rank of stage 0 has no base_model\S+ another has"),
        (state(lambda v: v.update({f"{B}q": torch.ones(3, 4)})), "has other shapes or types on"),
        (state(lambda v: v.update({HEAD: torch.ones(3, 4)})), r"has base_model\.model\.lm_head"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    trained: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    home = shards(trained, tmp_path / "out", tp=4, copies=2)
    damage(home)
    assert is_adapter(tmp_path / "out")
    for read in (open_adapter, lambda path: table([*describe(path)])):
        with pytest.raises(CheckpointError, match=words) as refused:
            read(tmp_path / "out")
        assert "\n" not in str(refused.value)


def test_a_stacked_factor_without_a_name_of_its_own_is_refused(
    trained: Path, tmp_path: Path
) -> None:
    home = shards(trained, tmp_path / "out", copies=2, fused=True)
    path = next((home / "adapter_shards" / "model").glob("*.pt"))
    names = {name: name.replace("weight_qkv", "weight") for name in torch.load(path)}
    torch.save({names[name]: tensor for name, tensor in torch.load(path).items()}, path)
    meta = home / "adapter_shards" / "mp_metadata_pp_rank_0.json"
    meta.write_text(meta.read_text().replace("weight_qkv", "weight"))
    with pytest.raises(CheckpointError, match="does not fit"):
        open_adapter(home)


def test_values_that_ranks_should_share_are_those_of_the_first(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = shards(trained, tmp_path / "out", tp=4, copies=2)
    name = "base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight"
    state(lambda values: values[name].add_(1))(home)
    source, _ = open_adapter(home)
    expected, _ = open_adapter(trained / "adapter")
    own = "model.layers.0.self_attn.q_proj.lora_A.weight"
    assert torch.equal(source.read(own), expected.read(own))
    assert "has other values on some tensor rank" in caplog.text


def test_a_whole_file_beside_shards_is_taken(trained: Path, tmp_path: Path) -> None:
    home = shards(trained, tmp_path / "out", tp=2)
    shutil.copy(trained / "adapter" / "adapter_model.safetensors", home)
    lose_a_rank(home)
    assert open_adapter(home)[0].names()
