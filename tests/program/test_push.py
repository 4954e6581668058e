"""``llamax push`` to a stand-in of the Hub, by the real client, and read back by transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from huggingface_hub import ModelCard, constants
from peft import PeftConfig
from support.hub import TOKEN, Hub, served_hub, use
from support.tiny_run import config, make_dataset

import llamax
from llamax.cli.push import main
from llamax.config.schema import FinetuneConfig
from llamax.runtime.errors import CheckpointError, ConfigError, HubError
from llamax.runtime.process import run_main

ROWS = "hf://datasets/org/rows@" + "a" * 40


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its exported folder, and a run of adapters on it and theirs."""
    home = tmp_path_factory.mktemp("home")
    (home / "data").mkdir()
    make_dataset(home / "data")
    index = json.loads((home / "data/dataset.json").read_text())
    (home / "data/dataset.json").write_text(json.dumps(index | {"from_hub": [ROWS]}))
    cfg = config(home / "data", home / "run")
    llamax.train(cfg)
    (home / "data").rename(home / "away")  # it has no real tokenizer
    llamax.consolidate(home / "run", home / "run/hub")
    (home / "away").rename(home / "data")
    start = replace(cfg.checkpoint, init_from=str(home / "run/hub"))
    tuned = replace(cfg, checkpoint=start, finetune=FinetuneConfig(method="lora", r=4))
    llamax.train(tuned, run={"folder": str(home / "tuned")})
    llamax.consolidate(home / "tuned", home / "tuned/peft")
    return home


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with served_hub() as served:
        use(served, tmp_path / "home", monkeypatch, TOKEN)
        yield served


def test_a_model_is_pushed_and_read_back(hub: Hub, home: Path, tmp_path: Path) -> None:
    folder = home / "run/hub"
    (folder / "optimizer.bin").write_bytes(b"not the model's")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = llamax.push(folder, "org/mine", private=True, license="apache-2.0")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    repository = hub.repositories["org/mine"]
    assert repository.private
    commit = repository.refs["main"]
    assert done.url == f"{hub.endpoint}/org/mine/commit/{commit}"
    assert len(repository.commits) == 2, "an empty repository, and one commit"
    files = repository.commits[commit]
    assert {n: len(files[n]) for n in done.files} == done.files
    assert {*files} == {*done.files, ".gitattributes"}
    assert "optimizer.bin" not in files
    assert files["model.safetensors"] == before["model.safetensors"]

    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "apache-2.0"
    assert (card.data.datasets, card.data.library_name) == (["org/rows"], "transformers")
    assert "| optim.lr | 0.003 |" in card.text
    assert "| steps | 6 |" in card.text
    assert "validation loss, at the end | " in card.text
    assert f"[org/rows](https://huggingface.co/datasets/org/rows), commit `{'a' * 40}`" in card.text
    for data in files.values():
        assert str(home).encode() not in data, "no path of this machine"
        assert TOKEN.encode() not in data
    loaded = transformers.AutoModelForCausalLM.from_pretrained("org/mine")
    own = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in own.state_dict().items():
        assert loaded.state_dict()[name].equal(weight)


def test_adapters_become_a_repository_of_peft(hub: Hub, home: Path) -> None:
    with pytest.raises(ConfigError, match=r"the adapters name their base /.*run/hub, which other"):
        llamax.push(home / "tuned/peft", "org/adapters")
    assert not hub.repositories
    done = llamax.push(home / "tuned/peft", "org/adapters", base_model="org/base", revision="trial")
    repository = hub.repositories["org/adapters"]
    files = repository.commits[repository.refs["trial"]]
    assert "adapter_model.safetensors" in files
    assert repository.refs["main"] != repository.refs["trial"]
    peft = PeftConfig.from_pretrained("org/adapters", revision="trial")
    assert peft.base_model_name_or_path == "org/base"
    card = ModelCard(done.card)
    assert (card.data.base_model, card.data.library_name) == ("org/base", "peft")
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert "| finetune.r | 4 |" in card.text
    assert 'tokenizer = AutoTokenizer.from_pretrained("org/base")' in card.text
    assert card.data.license is None
    assert "To be filled in" in card.text
    assert all(str(home).encode() not in data for data in files.values())


def test_a_dry_run_lists_what_would_go_up(
    hub: Hub, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(main, [str(home / "run/hub"), "org/mine", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert not hub.requests
    assert "model.safetensors " in out
    assert "# mine" in out
    assert "; nothing was sent\nthe card names no licence: give --license, or fill it in" in out
    assert run_main(main, [str(home / "run/hub"), "org/mine", "--license", "mit"]) == 0
    assert f"KiB: {hub.endpoint}/org/mine/commit/" in capsys.readouterr().out


def test_a_card_in_the_folder_is_kept(hub: Hub, home: Path, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    for path in (home / "run/hub").iterdir():
        (tmp_path / "hub" / path.name).write_bytes(path.read_bytes())
    assert llamax.push(tmp_path / "hub", "org/mine", dry_run=True).run is None
    (tmp_path / "hub/README.md").write_text("mine\n")
    done = llamax.push(tmp_path / "hub", "org/mine", run=home / "run")
    assert (done.own_card, done.run, done.card) == (True, home / "run", "mine\n")
    repository = hub.repositories["org/mine"]
    assert repository.commits[repository.refs["main"]]["README.md"] == b"mine\n"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 7}, r"hub/config.json: num_key_value_heads=\d+ does not divide"),
        ({"hidden_size": 10**12}, r"hub/config.json: hidden_size is 1000000000000; a Llama needs"),
        ({"rms_norm_eps": -1}, r"hub/config.json: rms_norm_eps is -1; it must be a number above 0"),
        ({"vocab_size": 7}, r"is \[\d+, \d+\], the model's is \[7, \d+\] by its config.json; exp"),
        ({"num_hidden_layers": 9}, r"states num_hidden_layers=9, but the files hold tensors of"),
        ({"num_hidden_layers": 1}, r"has model.layers.1.\S+, which the model lacks by its config."),
    ],
)
def test_a_model_that_its_config_does_not_describe_is_not_pushed(
    hub: Hub, home: Path, tmp_path: Path, changes: dict[str, float], words: str
) -> None:
    folder = tmp_path / "hub"
    shutil.copytree(home / "run/hub", folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | changes))
    for dry_run in (True, False):
        with pytest.raises((CheckpointError, ConfigError), match=words) as caught:
            llamax.push(folder, "org/x", dry_run=dry_run)
        assert "\n" not in str(caught.value)
    assert not hub.requests


def test_what_cannot_be_pushed_is_one_line(
    hub: Hub, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = home / "run/hub"
    cases = [
        (
            home / "run",
            "org/x",
            r"is a run or a checkpoint, not an exported model; first: lla",
        ),
        (home / "data", "org/x", r"holds no exported model: no config.json and no adapter_config"),
        (
            home / "none",
            "org/x",
            r"there is no folder .*none; give the folder of an export",
        ),
        (
            folder,
            "mine",
            "mine is no name of a repository; write its owner too, .* such as me/mine",
        ),
        (folder, "a/b/c", r"hf://a/b/c names a file of a repository; write hf://a/b"),
        (home / "none", str(folder), r"none; the folder comes first: llamax push .*hub org/name"),
        (folder, "org/x@" + "a" * 40, r"is a commit, which cannot change; name a branch to write"),
    ]
    for place, name, words in cases:
        with pytest.raises((CheckpointError, ConfigError), match=words):
            llamax.push(place, name)
    with pytest.raises(ConfigError, match="org/x@a names another revision than `revision=b`"):
        llamax.push(folder, "org/x@a", revision="b")
    with pytest.raises(CheckpointError, match=r"data is no run: it has no config\.toml; choose an"):
        llamax.push(folder, "org/x", run=home / "data")
    assert not hub.requests
    for status, words in (
        (401, "the Hub refuses the token of .*/token for org/x"),
        (403, r"use one that may write to it \(hf auth login, or HF_TOKEN\)"),
        (429, "the Hub limits the requests from here"),
        (500, "the Hub answers 500 for org/x"),
    ):
        hub.fail = {"commit/main": status}
        with pytest.raises(HubError, match=words):
            llamax.push(folder, "org/x")
        repository = hub.repositories["org/x"]
        assert [*repository.commits[repository.refs["main"]]] == [".gitattributes"]
    Path(constants.HF_TOKEN_PATH).unlink()
    asked = len(hub.requests)
    with pytest.raises(HubError, match="to write to org/x log in here first: hf auth login, or HF"):
        llamax.push(folder, "org/x")
    assert len(hub.requests) == asked
