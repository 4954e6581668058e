"""Runs that start from a model on the Hub, by a stand-in and the real huggingface_hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from support.hub import TOKEN, Hub, environment, served_hub, use
from support.models import tiny
from support.tiny_run import config, fork_ranks, make_dataset, write_tables

import llamax
from llamax.checkpoint.hf_folder import open_source
from llamax.checkpoint.peft import adapter_info
from llamax.cli.train import main
from llamax.config.load import load_config, recorded_config
from llamax.runtime import hub as hub_module
from llamax.runtime.errors import ConfigError
from llamax.runtime.process import run_main
from llamax.training.inputs import Inputs

BASE = tiny(num_hidden_layers=1, max_position_embeddings=128)


def save_model(folder: Path, seed: int) -> Path:
    transformers.set_seed(seed)
    shape = transformers.LlamaConfig(**BASE.to_hub("float32"))
    transformers.LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    make_dataset(tmp_path / "data")
    with served_hub() as served:
        served.add("org/base", save_model(tmp_path / "saved", 1), gated=True)
        use(served, tmp_path / "home", monkeypatch, TOKEN)
        monkeypatch.setattr(hub_module, "SHARED_S", 0.0)
        yield served


def settings(**changes: dict[str, Any]) -> dict[str, Any]:
    """A tiny run without [model] that starts from org/base."""
    cfg = config(Path("data"), Path("run"))
    tables: dict[str, Any] = {
        "optim": {"lr": 3e-3, "warmup_steps": 0},
        "data": {"path": "data", "sequence_length": 32, "global_batch": 4},
        "checkpoint": {"init_from": "org/base"},
        "run": {"folder": "run", "steps": 2, "progress": "off", "threads": cfg.run.threads},
    }
    for name, values in changes.items():
        tables.setdefault(name, {}).update(values)
    return tables


def test_a_run_keeps_the_commit_that_it_started_from(hub: Hub, tmp_path: Path) -> None:
    commit = hub.repositories["org/base"].refs["main"]
    lora = {"finetune": {"method": "lora", "r": 4}}
    run = llamax.train(settings(**lora))
    assert run.config.checkpoint.init_from == f"org/base@{commit}"
    assert recorded_config(run.folder / "config.toml").checkpoint.init_from == f"org/base@{commit}"
    assert hub.downloads() == ["config.json", "generation_config.json", "model.safetensors"]
    later = hub.add("org/base", save_model(tmp_path / "later", 2))
    assert later != commit
    longer = llamax.train(settings(**lora, run={"steps": 3}))
    assert (longer.step, longer.config.checkpoint.init_from) == (3, f"org/base@{commit}")
    other = llamax.train(settings(run={"folder": "other", "steps": 1}))
    assert other.config.checkpoint.init_from == f"org/base@{later}"

    # the base of the adapters is found by its name, and PEFT finds it too
    assert run.checkpoint is not None
    info = adapter_info(open_source(run.folder))
    assert info is not None
    assert info.base == f"org/base@{commit}"
    peft = llamax.consolidate(run.folder, tmp_path / "peft")
    written = json.loads((peft / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("org/base", commit)
    again = adapter_info(open_source(llamax.merge(peft, tmp_path / "merged")))
    assert again is None, "a merged folder is a whole model"
    (peft / "base.json").unlink()
    llamax.merge(peft, tmp_path / "merged-2")
    for name in ("merged", "merged-2"):
        head = open_source(tmp_path / name).read("lm_head.weight")
        assert torch.equal(head, open_source(tmp_path / "saved").read("lm_head.weight"))
    for path in (each for each in tmp_path.rglob("*") if each.is_file()):
        assert TOKEN.encode() not in path.read_bytes() or path.name == "token"


def test_planning_reads_the_shape_alone(hub: Hub) -> None:
    planned = load_config(
        "demo", ["--checkpoint.init_from=org/base@main", "--data.sequence_length=64"]
    )
    assert planned.model == BASE
    assert hub.downloads() == ["config.json", "generation_config.json"]
    assert llamax.describe("org/base")  # and any command takes the name


def test_every_rank_of_a_program_starts_from_the_same_commit(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tables(tmp_path / "run.toml", settings(run={"steps": 1}))
    for name, value in environment(hub, tmp_path / "other", TOKEN).items():
        monkeypatch.setenv(name, value)
    job = fork_ranks(2, "--config", path)
    _, stderr = job.communicate(timeout=300)
    assert job.returncode == 0, stderr
    assert hub.downloads() == ["config.json", "generation_config.json", "model.safetensors"]
    commit = hub.repositories["org/base"].refs["main"]
    assert f"model and first weights: org/base@{commit}" in stderr
    assert "http" not in stderr


def test_a_gated_base_is_one_line(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tables(tmp_path / "run.toml", settings())
    Path(constants.HF_TOKEN_PATH).unlink()
    assert run_main(main, ["--config", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"llamax: org/base is gated: accept its terms at {hub.endpoint}/org/base with your "
        "account, then log in here (hf auth login, or HF_TOKEN)\n"
    )
    assert not (tmp_path / "run").exists()


def test_machines_that_start_from_other_commits_are_refused() -> None:
    own, other = "a" * 40, "b" * 40
    asked: list[int] = []

    def check(init_from: str, first: int | None) -> None:
        """Check a base where rank 0 gives the number ``first``; None: that of this rank."""
        cfg = load_config("demo", [], within=None)
        inputs = SimpleNamespace(
            config=replace(cfg, checkpoint=replace(cfg.checkpoint, init_from=init_from))
        )

        def of_rank_0(name: str, value: int) -> int:
            asked.append(value)
            return value if first is None else first

        Inputs.check_base(inputs, of_rank_0)  # type: ignore[arg-type]

    for init_from in ("", "saved", f"org/base@{own}"):
        check(init_from, None)
    assert asked == [0, int(own, 16)]  # nothing is asked without a base
    message = rf"is org/base@{own} on this machine and org/base@{other} on that of rank 0; give all"
    with pytest.raises(ConfigError, match=message):
        check(f"org/base@{own}", int(other, 16))
    with pytest.raises(ConfigError, match=r"on this machine and a folder on that of rank 0"):
        check(f"org/base@{own}", 0)
    with pytest.raises(ConfigError, match=rf"is saved on this machine and saved@{other} on that"):
        check("saved", int(other, 16))
