"""Runs whose model is that of checkpoint.init_from alone, judged by transformers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.models import tiny
from support.tiny_run import config, fork_ranks, log_of, make_dataset, write_tables

import llamax
from llamax.checkpoint.hf_folder import open_source
from llamax.cli.train import main
from llamax.config.load import recorded_config
from llamax.config.model import ModelConfig, RopeScaling
from llamax.config.schema import Config
from llamax.data.batch_plan import BatchPlan
from llamax.data.dataset import open_dataset
from llamax.data.loader import Loader
from llamax.runtime.errors import CheckpointError, ConfigError
from llamax.runtime.process import run_main

BASE = tiny(num_hidden_layers=1, max_position_embeddings=128, rope_theta=5e5)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a dataset and the folder ``base``."""
    (tmp_path / "data").mkdir()
    make_dataset(tmp_path / "data")
    hub_folder(tmp_path / "base", BASE)
    return tmp_path


def hub_folder(folder: Path, model: ModelConfig) -> None:
    transformers.set_seed(1)
    shape = transformers.LlamaConfig(**model.to_hub("float32"))
    transformers.LlamaForCausalLM(shape).save_pretrained(folder)


def sections(home: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """The settings of a tiny run without [model], that start from ``base``."""
    cfg = asdict(config(home / "data", home / "run"))
    del cfg["model"]
    cfg["checkpoint"]["init_from"] = str(home / "base")
    cfg["parallel"]["tensor"] = 1
    for name, values in changes.items():
        cfg.setdefault(name, {}).update(values)
    return cfg


def first_loss(home: Path, cfg: Config, **rope: Any) -> float:
    """The loss of the first batch, as transformers computes it with the weights of ``base``."""
    plan = BatchPlan(cfg.run.seed, cfg.data.sequence_length, cfg.data.global_batch, 4)
    batch = Loader(open_dataset(home / "data").train, plan).step()[0]
    assert batch.documents is not None
    same = batch.documents.unsqueeze(1) == batch.documents.unsqueeze(2)
    shape = transformers.LlamaConfig.from_pretrained(home / "base", **rope)
    reference = transformers.LlamaForCausalLM.from_pretrained(home / "base", config=shape)
    logits = reference(
        batch.ids, position_ids=batch.positions, attention_mask=same.tril().unsqueeze(1)
    ).logits
    flat = logits.detach().flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(flat, batch.labels.flatten()))


def test_the_folder_alone_gives_the_model(home: Path) -> None:
    run = llamax.train(sections(home, data={"global_batch": 4}))
    assert run.config.model == BASE
    expected = first_loss(home, run.config)
    assert run.metrics[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert ModelConfig.from_hub(open_source(run.folder).model) == BASE


def test_rope_scaling_of_the_users_own_extends_the_context(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 16}
    model = {"rope_scaling": scaling, "max_position_embeddings": 512}
    run = llamax.train(sections(home, data={"global_batch": 4}), model=model)
    wanted = RopeScaling(factor=4.0, original_max_position_embeddings=16)
    assert run.config.model == replace(BASE, rope_scaling=wanted, max_position_embeddings=512)
    assert f"not as in {home / 'base'}: rope_scaling" in capsys.readouterr().err
    rope = {"rope_type": "llama3", "rope_theta": 5e5, **asdict(wanted)}
    scaled = first_loss(home, run.config, rope_parameters=rope)
    assert run.metrics[0]["loss"] == pytest.approx(scaled, rel=1e-5)
    assert abs(scaled - first_loss(home, run.config)) > 1e-4, "the scaling must matter"
    assert ModelConfig.from_hub(open_source(run.folder).model) == run.config.model
    again = llamax.train(sections(home, data={"global_batch": 4}, run={"steps": 9}), model=model)
    assert again.step == 9
    with pytest.raises(ConfigError, match=r"model.rope_scaling=None but .*step-00000009 has"):
        llamax.train(sections(home, data={"global_batch": 4}))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_goes_on_after_its_folder_was_moved(home: Path, ranks: int) -> None:
    path = write_tables(home / "own.toml", sections(home, parallel={"tensor": ranks}))
    steps = recorded_steps = 0
    for steps in (2, 4):
        job = fork_ranks(ranks, "--config", path, f"--run.steps={steps}")
        _, stderr = job.communicate(timeout=300)
        assert job.returncode == 0, stderr
        recorded_steps = len(log_of(home / "run"))
        shutil.rmtree(home / "base", ignore_errors=True)
    assert recorded_steps == steps == 4
    assert recorded_config(home / "run/config.toml").model == BASE


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_take_the_model_of_their_base(
    home: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune = {"method": method, "r": 4, "quant": "int8"}
    path = write_tables(home / "own.toml", sections(home, finetune=finetune))
    assert run_main(main, ["--config", str(path)]) == 0
    shutil.move(home / "base", home / "moved")
    capsys.readouterr()
    again = ["--config", str(path), "--run.steps=9"]
    assert run_main(main, again) == 2
    assert "there is no folder" in capsys.readouterr().err, "the weights are still needed"
    assert run_main(main, [*again, f"--checkpoint.init_from={home / 'moved'}"]) == 0
    assert recorded_config(home / "run/config.toml").model == BASE


def test_another_base_of_a_run_that_goes_on_is_named(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llamax.train(sections(home))
    capsys.readouterr()
    llamax.train(sections(home, checkpoint={"init_from": "elsewhere"}, run={"steps": 9}))
    says = f'checkpoint.init_from "{home / "base"}" -> "elsewhere" (not read by a run that '
    assert f"{says}goes on)" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="resume=always is neither auto, intact, never nor a"):
        llamax.train(sections(home, checkpoint={"resume": "always"}))


def test_settings_of_adapters_without_adapters_are_named(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for finetune, words in (
        (
            {"r": 4},
            "finetune.r=4 has no effect with finetune.method=full; it is of finetune.method",
        ),
        (
            {"method": "lora", "quant": "int8"},
            "finetune.quant=int8 has no effect with finetune.met",
        ),
        ({"method": "lora", "r": 4}, ""),
    ):
        run = {"folder": str(home / f"run-{len(words)}"), "steps": 1}
        llamax.train(sections(home, finetune=finetune, run=run))
        said = capsys.readouterr().err
        assert words in said
        assert ("has no effect" in said) == bool(words)


def test_a_head_of_its_own_under_a_config_that_says_tied_is_kept(home: Path) -> None:
    hub_folder(home / "base", replace(BASE, tie_word_embeddings=True))
    tensors = load_file(home / "base/model.safetensors")
    tensors["lm_head.weight"] = torch.randn(61, 32) * 0.1
    save_file(tensors, home / "base/model.safetensors", metadata={"format": "pt"})
    run = llamax.train(sections(home, optim={"lr": 1e-9, "min_lr": 0.0}))
    again = llamax.train(sections(home, run={"steps": 9}, optim={"lr": 1e-9, "min_lr": 0.0}))
    assert again.step == 9
    assert not recorded_config(home / "run/config.toml").model.tie_word_embeddings
    head = open_source(run.folder).read("lm_head.weight")
    assert torch.allclose(head, tensors["lm_head.weight"], atol=1e-6)
    # and the run's own configuration starts it again
    assert run_main(main, ["--config", str(home / "run/config.toml"), "--run.steps=10"]) == 0
    # --precompile traces the programs of a model with a head, too
    path = write_tables(home / "own.toml", sections(home, run={"folder": str(home / "new")}))
    assert run_main(main, ["--config", str(path), "--precompile"]) == 0


def test_a_base_that_is_missing_is_named_once_on_two_ranks(home: Path) -> None:
    command = [sys.executable, "-m", "llamax", "train", "--config", "demo", "--ranks", "2"]
    command += ["--checkpoint.init_from=later", f"--data.path={home / 'nothing'}"]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    first, second = done.stderr.splitlines()
    assert first.startswith("llamax: checkpoint.init_from=later is not a folder on this machine")
    assert "is not a dataset" in second or "no such" in second
