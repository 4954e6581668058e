"""The model that checkpoint.init_from supplies, and what a user may give beside it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from support.models import tiny

from llamax.config.load import dump_config, load_config, parse_config, recorded_config
from llamax.config.model import ModelConfig, RopeScaling
from llamax.launch import jobfile
from llamax.runtime import warn
from llamax.runtime.errors import ConfigError, HubError
from llamax.tools.plan.planner import plan
from llamax.training.library import config_of

BASE = tiny(vocab_size=320, max_position_embeddings=512, rope_theta=5e5)
MIXED = replace(BASE, eos_token_id=(2, 5))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the folder ``base`` as transformers writes it."""
    monkeypatch.chdir(tmp_path)
    warn._log_once.cache_clear()
    transformers.LlamaConfig(**MIXED.to_hub("float32")).save_pretrained("base")
    return tmp_path


def tables(**sections: Any) -> dict[str, Any]:
    return {"checkpoint": {"init_from": "base"}, "data": {"sequence_length": 64}, **sections}


def step(path: Path, model: ModelConfig, done: bool = True) -> None:
    path.mkdir(parents=True)
    (path / "manifest.json").write_text(json.dumps({"model": model.to_hub("float32")}))
    if done:
        (path / "done").touch()


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_supplies_the_whole_model(folder: Path) -> None:
    assert parse_config(tables()).model == MIXED
    chosen = parse_config({"data": {"sequence_length": 64}}, ["--checkpoint.init_from=base"])
    assert chosen.model == MIXED
    (folder / "base/generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert parse_config(tables()).model.eos_token_id == (2, 7), "as transformers generates"


def test_equal_fields_may_be_given_and_others_are_refused(folder: Path) -> None:
    given = {"hidden_size": 32, "num_hidden_layers": 2}
    assert parse_config(tables(model=given)).model == MIXED
    line = refused(tables(model=given), ["--model.hidden_size=64"])
    assert line == (
        "command line: model.hidden_size=64 but base has 32; "
        "leave it out: checkpoint.init_from supplies the model"
    )
    line = refused(tables(model={"vocab_size": 61, "rms_norm_eps": 1e-6}), where="my.toml")
    assert line.startswith("my.toml: model.vocab_size=61 but base has 320 (also model.rms_")


def test_what_the_weights_leave_open_stays_the_users(folder: Path) -> None:
    longer = ["--model.rope_scaling.factor=8", "--model.max_position_embeddings=4096"]
    scaled = parse_config(tables(), [*longer, "--model.eos_token_id=[3]"]).model
    assert scaled == replace(
        MIXED, rope_scaling=RopeScaling(), max_position_embeddings=4096, eos_token_id=(3,)
    )
    transformers.LlamaConfig(**scaled.to_hub("float32")).save_pretrained("base")
    assert parse_config(tables(), ["--model.rope_scaling=none"]).model.rope_scaling is None


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_leave_rotary_positions_to_their_base(folder: Path, method: str) -> None:
    wanted = [f"--finetune.method={method}", "--finetune.quant=int8"]
    assert parse_config(tables(), wanted).model == MIXED
    line = refused(tables(), [*wanted, "--model.rope_theta=1e6"])
    assert "model.rope_theta=1000000.0 but base has 500000.0; finetune.method=" in line


def test_the_model_of_a_recipe_gives_way(folder: Path) -> None:
    recipe = ["--checkpoint.init_from=base", "--data.sequence_length=64"]
    assert load_config("finetune-demo", recipe).model == MIXED
    assert load_config("finetune-demo", [*recipe, "--model.hidden_size=32"]).model == MIXED
    with pytest.raises(ConfigError, match=r"model.hidden_size=48 but base has 32"):
        load_config("finetune-demo", [*recipe, "--model.hidden_size=48"])
    settings = {"checkpoint.init_from": "base", "data": {"sequence_length": 64}}
    assert config_of("finetune-demo", settings, 2).model == MIXED
    with pytest.raises(ConfigError, match=r"model.hidden_size=48 but base has 32"):
        config_of("finetune-demo", {**settings, "model.hidden_size": 48}, 2)
    assert config_of(tables(), {}, 1).model == MIXED
    (folder / "models").mkdir()
    shutil.copytree("base", "models/Llama-2-7b-hf")
    named = load_config("dolly-llama2-7b", ["--parallel.tensor=2", "--data.sequence_length=64"])
    assert named.model == MIXED, "its own folder holds another model"


def test_a_recipe_is_planned_before_its_base_is_there(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = load_config("gsm8k-lora").model.num_parameters()
    assert whole == 1_235_814_400
    assert not caplog.messages, "nothing but its own folder is named"
    changed = load_config("gsm8k-lora", ["--checkpoint.init_from=later"])
    assert changed.model.num_parameters() == whole
    (line,) = caplog.messages
    assert line == (
        "checkpoint.init_from=later is not a folder on this machine; check the path; until then "
        "the model is that of the recipe"
    )


def test_a_folder_without_a_model_is_named(folder: Path) -> None:
    def missing(name: str) -> str:
        return refused(tables(checkpoint={"init_from": name}))

    (folder / "empty").mkdir()
    (folder / "meta").mkdir()
    (folder / "meta/params.json").write_text("{}")
    assert "nowhere is not a folder on this machine; check the path, or" in missing("nowhere")
    assert "empty has no config.json and no complete checkpoint" in missing("empty")
    assert "meta is in Meta's format; convert it with llamax import" in missing("meta")
    (folder / "peft").mkdir()
    (folder / "peft/adapter_config.json").write_text("{}")
    assert "peft holds adapters; merge them with llamax merge first" in missing("peft")
    hub = missing("models/Llama-3.2-1B")
    assert "download the model: hf download OWNER/Llama-3.2-1B --local-dir models/Llama-3" in hub
    with pytest.raises(HubError, match=r"^meta-llama/Llama-3.2-1B is not on this machine and HF_H"):
        missing("meta-llama/Llama-3.2-1B")
    shape = {name: value for name, value in vars(tiny()).items() if value is not None}
    given = parse_config(tables(model=shape, checkpoint={"init_from": "nowhere"}))
    assert given.model == tiny(), "whoever writes all of it needs no folder to plan"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "base/config.json is not JSON"),
        ("[]", "base/config.json is not a JSON object"),
        ('{"model_type": "mistral"}', "model_type='mistral' is not supported"),
    ],
)
def test_a_config_json_that_is_no_llama_is_refused(folder: Path, text: str, problem: str) -> None:
    (folder / "base/config.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse_config(tables())
    assert problem in str(caught.value)
    assert str(caught.value).startswith("base/config.json")


def test_runs_and_checkpoints_are_bases(folder: Path) -> None:
    step(folder / "run/checkpoints/step-00000004", tiny())
    step(folder / "run/checkpoints/step-00000012", MIXED)
    step(folder / "run/checkpoints/step-00000020", tiny(), done=False)
    for name in ("run", "run/checkpoints", "run/checkpoints/step-00000012"):
        assert parse_config(tables(checkpoint={"init_from": name})).model == MIXED
    (folder / "run/checkpoints/step-00000012/manifest.json").write_text('{"model": 3}')
    line = refused(tables(checkpoint={"init_from": "run"}))
    assert line.startswith("run/checkpoints/step-00000012/manifest.json describes no model")


def test_the_configuration_of_a_checkpoint_comes_before_its_large_manifest(folder: Path) -> None:
    saved = folder / "run/checkpoints/step-00000004"
    step(saved, tiny())
    config = parse_config(tables())
    (saved / "config.toml").write_text(dump_config(config))
    (saved / "manifest.json").write_text("not read")
    assert parse_config(tables(checkpoint={"init_from": "run"})).model == MIXED
    for text in ("[model", "[model]\nhidden_size = 3", "model = 3", ""):  # of another llamax
        (saved / "config.toml").write_text(text)
        (saved / "manifest.json").write_text(json.dumps({"model": MIXED.to_hub("float32")}))
        assert parse_config(tables(checkpoint={"init_from": "run"})).model == MIXED


def test_a_run_goes_on_without_the_folder(folder: Path) -> None:
    run = {"folder": "tuned"}
    step(folder / "tuned/checkpoints/step-00000004", MIXED)
    shutil.rmtree("base")
    assert parse_config(tables(run=run)).model == MIXED
    again = tables(run={"folder": "new"}, checkpoint={"init_from": "base", "resume": "tuned"})
    assert parse_config(again).model == MIXED
    never = tables(run=run, checkpoint={"init_from": "base", "resume": "never"})
    assert "base is not a folder" in refused(never)


def test_a_recorded_configuration_opens_no_folder(folder: Path) -> None:
    config = parse_config(tables())
    Path("config.toml").write_text(dump_config(config))
    assert load_config("config.toml") == config
    transformers.LlamaConfig(**tiny().to_hub("float32")).save_pretrained("base")
    assert recorded_config("config.toml") == config
    with pytest.raises(ConfigError, match=r"config.toml: model.vocab_size=320 but base has 61"):
        load_config("config.toml")


def test_plans_and_jobs_take_it(folder: Path) -> None:
    Path("own.toml").write_text(
        '[checkpoint]\ninit_from = "base"\n[data]\nsequence_length = 64\nglobal_batch = 2\n'
    )
    assert plan("own.toml", "cpu").run.config.model == MIXED
    (folder / "elsewhere").mkdir()
    job = {
        "name": "job",
        "recipe": str(folder / "own.toml"),
        "instance": "local",
        "ranks_per_node": 2,
        "storage": {"mount": str(folder / "elsewhere")},
    }
    with pytest.raises(ConfigError, match=r"elsewhere/base is not a folder on this machine"):
        _ = jobfile.parse(job).config
    shutil.move("base", "elsewhere/base")
    assert jobfile.parse(job).config.model == MIXED
