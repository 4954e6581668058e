"""LoRA adapters in PEFT's format, both ways."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.adapters import hub_folder
from support.models import LLAMA2, LLAMA3
from support.tiny_run import config
from support.tuned_run import tuned_run

from llamax.checkpoint.build_model import load_tuned
from llamax.checkpoint.listing import newest_checkpoint
from llamax.checkpoint.peft import (
    PeftFolder,
    adapter_info,
    export_adapter,
    is_adapter,
    open_adapter,
)
from llamax.checkpoint.reader import Checkpoint
from llamax.config.model import ModelConfig
from llamax.config.schema import FinetuneConfig
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import CheckpointError, ConfigError
from llamax.runtime.hub_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llamax.train import train

peft = pytest.importorskip("peft", reason="peft, the judge of LoRA, is not installed")

TOLERANCE = 1e-5


def reference(folder: Path, finetune: FinetuneConfig, seed: int = 1) -> Any:
    """A peft model whose factors are all random."""
    targets = finetune.targets
    settings = peft.LoraConfig(
        r=finetune.r,
        lora_alpha=finetune.alpha,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        use_rslora=finetune.rslora,
        task_type="CAUSAL_LM",
    )
    base = transformers.LlamaForCausalLM.from_pretrained(folder)
    tuned = peft.get_peft_model(base, settings)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    return tuned


def ids() -> torch.Tensor:
    return torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "finetune",
    [
        FinetuneConfig(r=4, alpha=6.0),
        FinetuneConfig(r=3, alpha=2.0, rslora=True, targets="q_proj,down_proj"),
    ],
    ids=["all-linear", "rslora-some"],
)
@pytest.mark.parametrize("model", [LLAMA2, LLAMA3], ids=["llama2", "llama3"])
def test_we_load_what_peft_saved_and_compute_the_same(
    tmp_path: Path, model: ModelConfig, finetune: FinetuneConfig
) -> None:
    base = hub_folder(tmp_path / "base", model)
    theirs = reference(base, finetune)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_tuned(tmp_path / "adapter")

    labels = ids().masked_fill(ids() % 5 == 0, -100)
    found = theirs(ids(), labels=labels)
    assert (ours(ids()) - found.logits).abs().max() <= TOLERANCE * found.logits.abs().max()
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    total, count = ours.loss(ids(), shifted)
    assert abs(total / count - found.loss) <= TOLERANCE * found.loss
    (total / count).backward()
    found.loss.backward()
    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if "lora_" in name
    }
    assert expected.keys() == ours.sharded_parameters().trained().tensors.keys()
    for name, parameter in ours.sharded_parameters().trained().tensors.items():
        error = (parameter.grad - expected[name]).abs().max() / expected[name].abs().max()
        assert error <= TOLERANCE, name


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, and the run of its adapters."""
    return tuned_run(tmp_path_factory.mktemp("lora"))


def test_peft_loads_what_we_trained_and_computes_the_same(run: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(newest_checkpoint(run / "run") or "")
    export_adapter(checkpoint, tmp_path / "adapter")
    base = transformers.LlamaForCausalLM.from_pretrained(run / "base")
    plain = base(ids()).logits
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    expected = theirs(ids()).logits
    assert (expected - plain).abs().max() > 0.01
    for adapter in (run / "run", tmp_path / "adapter"):
        found = load_tuned(adapter)(ids())
        assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert theirs.peft_config["default"].r == 4
    assert theirs.peft_config["default"].lora_dropout == 0.1


def test_a_checkpoint_of_adapters_holds_nothing_else(run: Path) -> None:
    checkpoint = Checkpoint(newest_checkpoint(run / "run") or "")
    assert len(checkpoint.names()) == 2 * 7 * 2
    assert all(".lora_A." in name or ".lora_B." in name for name in checkpoint.names())
    found = adapter_info(checkpoint)
    assert found is not None
    assert (found.finetune.r, found.base) == (4, str(run / "base"))


# --- what is refused -----------------------------------------------------------------------------


def test_an_adapter_of_another_base_is_refused(run: Path, tmp_path: Path) -> None:
    other = hub_folder(tmp_path / "other", LLAMA3, seed=5)
    with pytest.raises(CheckpointError, match=r"is an adapter of another base: .*other has") as e:
        load_tuned(run / "run", other)
    assert f"use {run / 'base'}" in str(e.value)
    load_tuned(run / "run", run / "base")


def test_a_missing_base_of_an_adapter_is_named(tmp_path: Path) -> None:
    base = hub_folder(tmp_path / "base", LLAMA2)
    reference(base, FinetuneConfig(r=2)).save_pretrained(tmp_path / "adapter")
    shutil.move(base, tmp_path / "moved")
    with pytest.raises(
        CheckpointError, match=r"is an adapter of .*base, which does not exist here"
    ):
        load_tuned(tmp_path / "adapter")
    load_tuned(tmp_path / "adapter", tmp_path / "moved")


def test_adapters_are_no_base(run: Path) -> None:
    with pytest.raises(CheckpointError, match="holds adapters, not a model; merge them"):
        load_tuned(run / "run", run / "run")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"use_dora": True},
            "has no .*lora_magnitude_vector, which use_dora of its adapter_config",
        ),
        ({"lora_bias": True}, "lora_bias=True is not supported; llamax computes False only"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication=\[\[0, 2\]\] is not supported"),
        ({"target_parameters": ["a"]}, r"target_parameters=\['a'\] is not supported"),
        ({"of_peft_9": 1}, "'of_peft_9'=1 is a setting that llamax does not know; remove it"),
        ({"modules_to_save": ["lm_head"]}, "has no lm_head.weight, which modules_to_save"),
        ({"trainable_token_indices": [1]}, "has no .*trainable_tokens_delta, which trainable_tok"),
        ({"target_modules": ["q_proj"]}, "has .*_proj.lora_A.weight, which is not a LoRA"),
        ({"layers_to_transform": [1]}, "has .*layers.0.*lora_A.weight, which is not a LoRA factor"),
        ({"target_modules": "("}, r"target_modules='\(' is not a list of names or a regular"),
        ({"target_modules": [1]}, r"target_modules=\[1\] is not a list of names or a regular"),
        (
            {"exclude_modules": 3},
            "exclude_modules=3 is not a list of names or a regular expression",
        ),
        (
            {"layers_to_transform": "0"},
            "layers_to_transform='0' is not a layer or a list of layers",
        ),
        ({"layers_pattern": [2]}, r"layers_pattern=\[2\] is not a name or a list of names"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern=\{'q_proj': 0\} is not an object of"),
        (
            {"rank_pattern": {"q_proj": 2}},
            "lora_A.weight has rank 4, but r and rank_pattern state 2",
        ),
        ({"alpha_pattern": {"(": 2}}, r"alpha_pattern=\{'\(': 2\} is not an object of patterns"),
        ({"modules_to_save": "norm"}, "modules_to_save='norm' is not a list of names; save"),
        ({"trainable_token_indices": "all"}, "token_indices='all' is not a list of tokens, or one"),
        ({"ensure_weight_tying": 1}, "ensure_weight_tying=1 is not true or false; save"),
        ({"alora_invocation_tokens": [5]}, r"alora_invocation_tokens=\[5\] is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base of the adapter"),
        ({"init_lora_weights": "loftq"}, "'loftq' changes the base of the adapter"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported; llamax reads LORA"),
        ({"r": "four"}, "r='four' is not a whole number above 0; save the adapter again"),
        ({"r": 4.0}, r"r=4\.0 is not a whole number above 0; save the adapter again"),
        ({"r": True}, "r=True is not a whole number above 0"),
        ({"r": 10**99}, r"r=10{76}\.\.\. is not a whole number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan is not a number above 0"),
        ({"lora_alpha": 10**400}, r"lora_alpha=10{76}\.\.\. is not a number above 0"),
        ({"lora_dropout": "a"}, "lora_dropout='a' is not 0 or more and below 1"),
        ({"lora_dropout": 1}, "lora_dropout=1 is not 0 or more and below 1"),
        ({"lora_dropout": [0]}, r"lora_dropout=\[0\] is not 0 or more and below 1"),
        ({"use_rslora": "no"}, "use_rslora='no' is not true or false"),
        ({"base_model_name_or_path": ["x"]}, r"path=\['x'\] is not the name of a model"),
        ({"base_model_name_or_path": "a\nb"}, r"path='a\\nb' is not the name of a model"),
        ({"init_lora_weights": [True]}, r"init_lora_weights=\[True\] changes the base"),
        ({"peft_type": {"a": []}}, r"peft_type=\{'a': \[\]\} is not supported"),
        ({"lora_alpha": 0}, "lora_alpha=0 is not a number above 0; save the adapter again"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_peft_does_and_llamax_does_not_is_refused(
    run: Path, tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    folder = export_adapter(Checkpoint(newest_checkpoint(run / "run") or ""), tmp_path / "adapter")
    PeftFolder(folder)
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=line):
        load_tuned(folder)


@pytest.mark.parametrize(
    ("rename", "line"),
    [
        (("self_attn.q_proj", "self_attn.query"), "is not a LoRA factor of a Llama projection"),
        (("layers.1.self_attn.q_proj", "layers.1.self_attn.lm"), "is not a LoRA factor"),
        (("0.self_attn.q_proj", None), "has no .*0.self_attn.q_proj.lora_A.weight, which target_m"),
        (("layers.0.", None), "has no model.layers.0.*lora_A.weight, which target_modules of its"),
        (("lora_A", "lora_magnitude"), "is not a LoRA factor of a Llama projection"),
    ],
    ids=["module", "one-layer", "missing", "layer", "factor"],
)
def test_tensors_that_fit_no_projection_are_refused(
    run: Path, tmp_path: Path, rename: tuple[str, str | None], line: str
) -> None:
    from safetensors.torch import load_file, save_file

    folder = export_adapter(Checkpoint(newest_checkpoint(run / "run") or ""), tmp_path / "adapter")
    old, new = rename
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    changed = {
        name.replace(old, new or ""): tensor
        for name, tensor in tensors.items()
        if new is not None or old not in name
    }
    save_file(changed, folder / ADAPTER_WEIGHTS)
    with pytest.raises(CheckpointError, match=line):
        load_tuned(folder)


def test_a_pickled_adapter_is_refused_by_name(run: Path, tmp_path: Path) -> None:
    folder = export_adapter(Checkpoint(newest_checkpoint(run / "run") or ""), tmp_path / "adapter")
    (folder / ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin")
    for reader in (PeftFolder, load_tuned, open_adapter):
        with pytest.raises(CheckpointError, match=r"has adapter_model.bin, a pickle, .*safe_ser"):
            reader(folder)


def test_a_model_is_no_adapter_and_a_folder_must_be_there(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"there is no folder .*; give a folder with adapters"
    ):
        open_adapter(tmp_path / "nothing")
    assert is_adapter(run / "run")
    assert not is_adapter(run / "base")
    (tmp_path / "run").mkdir()
    cfg = config(run / "data", tmp_path / "run")
    optim = dataclasses.replace(cfg.optim, warmup_steps=0)
    one_step = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, steps=1), optim=optim)
    train(one_step, Rendezvous())
    for whole in (tmp_path / "run", run / "base"):
        with pytest.raises(CheckpointError, match="holds a complete model, not adapters"):
            open_adapter(whole)
    assert not is_adapter(tmp_path / "run")

    tuned = dataclasses.replace(cfg, finetune=FinetuneConfig(method="lora"))
    tuned = dataclasses.replace(
        tuned, checkpoint=dataclasses.replace(cfg.checkpoint, init_from=str(run / "base"))
    )
    with pytest.raises(ConfigError, match=r"method=lora but .*step-0+1 was trained with full"):
        train(tuned, Rendezvous())


@pytest.mark.parametrize(
    ("finetune", "line"),
    [
        (
            FinetuneConfig(method="full"),
            "finetune.method=full but .* was trained with lora; use that",
        ),
        (FinetuneConfig(method="lora", r=8), "finetune.r=8 but .* was trained with 4; use that"),
        (FinetuneConfig(method="lora", r=4, targets="q_proj"), "finetune.targets=q_proj but .*"),
    ],
    ids=["method", "r", "targets"],
)
def test_a_run_goes_on_with_its_own_adapters_only(
    run: Path, finetune: FinetuneConfig, line: str
) -> None:
    cfg = config(run / "data", run / "run")
    start = "" if finetune.method == "full" else str(run / "base")
    cfg = dataclasses.replace(
        cfg, finetune=finetune, checkpoint=dataclasses.replace(cfg.checkpoint, init_from=start)
    )
    with pytest.raises(ConfigError, match=line):
        train(cfg, Rendezvous())


def test_a_run_does_not_go_on_with_another_base(run: Path, tmp_path: Path) -> None:
    cfg = config(run / "data", run / "run")
    other = hub_folder(tmp_path / "other", cfg.model, seed=9)
    cfg = dataclasses.replace(
        cfg,
        finetune=FinetuneConfig(method="lora", r=4),
        checkpoint=dataclasses.replace(cfg.checkpoint, init_from=str(other)),
    )
    with pytest.raises(CheckpointError, match="is an adapter of another base"):
        train(cfg, Rendezvous())


@pytest.mark.parametrize(
    ("base", "line"),
    [
        ({"folder": ["x"]}, r"base.json: folder=\['x'\] is not the name of a folder; save the"),
        ({"fingerprint": 7}, "base.json: fingerprint=7 is not a sha256; save the adapter again"),
        ({"fingerprint": "f" * 65}, "is not a sha256"),
        ([], "base.json is not a JSON object"),
    ],
)
def test_a_broken_description_of_the_base_is_refused(
    run: Path, tmp_path: Path, base: Any, line: str
) -> None:
    folder = export_adapter(Checkpoint(newest_checkpoint(run / "run") or ""), tmp_path / "adapter")
    (folder / "base.json").write_text("{}")
    assert PeftFolder(folder).info.fingerprint == ""
    (folder / "base.json").write_text(json.dumps(base))
    with pytest.raises(CheckpointError, match=line):
        PeftFolder(folder)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda state: state.pop("base"), "its state has no table base, as adapters need"),
        (lambda state: state.update(base=[1]), "its state has no table base"),
        (lambda state: state.update(finetune=3), "its state has no table finetune"),
        (lambda state: state["finetune"].update(r="8"), 'finetune.r="8" is a string; write'),
        (lambda state: state["finetune"].update(alpha=-1.0), "finetune.alpha=-1.0 is out of range"),
        (lambda state: state["finetune"].update(method="x"), 'finetune.method="x" is unknown'),
        (lambda state: state["base"].update(folder=1), "folder=1 is not the name of a folder"),
    ],
)
def test_a_broken_state_of_adapters_is_refused(
    run: Path, change: Callable[[dict[str, Any]], object], line: str
) -> None:
    source = Checkpoint(newest_checkpoint(run / "run") or "")
    assert adapter_info(source) is not None
    source.state["of a later version"] = source.state["finetune"]["of a later version"] = 1
    assert adapter_info(source) is not None
    change(source.state)
    with pytest.raises(CheckpointError, match=line):
        adapter_info(source)
