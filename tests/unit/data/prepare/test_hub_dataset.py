"""Datasets on a stand-in of the Hub: splits as ``datasets`` chooses them, commits, mistakes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.hub import Hub, served_hub, use
from support.instruction import llama2_tokenizer

import llamax
from llamax.data.dataset import open_dataset
from llamax.data.prepare.hub_dataset import (
    FROM_HUB,
    _matches,
    dataset_on_hub,
    made_from,
    splits_by_name,
)
from llamax.runtime import hub as hub_module
from llamax.runtime.errors import DataError, HubError, LlamaxError
from llamax.runtime.hub_name import HubName, hub_name
from llamax.tools.push.model_card import datasets_of


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with served_hub() as served:
        use(served, tmp_path / "home", monkeypatch)
        monkeypatch.setattr(hub_module, "SHARED_S", 0.0)
        yield served


# What get_data_patterns of datasets 4.8.5 chose for folders with these files.
@pytest.mark.parametrize(
    "splits",
    [
        {"train": ["rows.jsonl"]},
        {"train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
         "test": ["data/test-00000-of-00001.parquet"]},
        {"train_sft": ["data/train_sft-00000-of-00001-aaa.parquet"],
         "test_gen": ["data/test_gen-00000-of-00001.parquet"]},
        {"train": ["train.csv"], "validation": ["dev.csv"], "test": ["eval.csv"]},
        {"train": ["train/a.jsonl", "train/b.jsonl"], "validation": ["val/c.jsonl"]},
        {"train": ["my_train_file.jsonl"], "test": ["my-test.jsonl"], "": ["other.jsonl"]},
        {"train": ["training.jsonl"], "": ["contest.jsonl"]},
        {"train": ["latest.jsonl", "retrain.jsonl"]},
        {"train": ["de/train.jsonl", "en/train.jsonl"], "test": ["en/test.jsonl"]},
        {"train": ["train/test.jsonl"]},
        {"train": ["a/b.jsonl", "c.csv"]},
        {"train": ["TEST.jsonl", "Train.jsonl"]},
        {"test": ["evaluation results.jsonl"], "": ["x.jsonl"]},
        {"validation": ["data/validation.jsonl"]},
    ],
)  # fmt: skip
def test_splits_are_chosen_as_datasets_does(splits: dict[str, list[str]]) -> None:
    found = splits_by_name([path for paths in splits.values() for path in reversed(paths)])
    assert found == {split: paths for split, paths in splits.items() if split}


def name_of(text: str) -> HubName:
    name = hub_name(text, "dataset")
    assert name is not None
    return name


def chosen(text: str, split: str = "") -> dict[str, list[str]]:
    found = dataset_on_hub(name_of(text), split)
    return {
        purpose: [str(path).split("/snapshots/")[1].partition("/")[2] for path in paths]
        for purpose, paths in found.items()
    }


def refused(text: str, split: str = "", kind: type[LlamaxError] = DataError) -> str:
    with pytest.raises(kind) as caught:
        dataset_on_hub(name_of(text), split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def card(*configs: object) -> bytes:
    return f"---\n{json.dumps({'configs': configs})}\n---\n# Rows".encode()


FILES = {"en/a.jsonl": b"{}\n", "en/b.jsonl": b"{} \n", "de/a.jsonl": b"{}  \n", "x.py": b"evil"}


def test_the_card_names_the_files_of_splits(hub: Hub) -> None:
    both = {"config_name": "all", "data_files": "**/a.jsonl"}
    listed = [{"split": "train", "path": ["en/*"]}, {"split": "test", "path": "de/*.jsonl"}]
    german = {"config_name": "default", "data_files": listed}
    hub.add("datasets/org/rows", {**FILES, "README.md": card(both, german)})
    assert chosen("org/rows") == {"train": ["en/a.jsonl", "en/b.jsonl"], "test": ["de/a.jsonl"]}
    assert chosen("org/rows", "test") == {"test": ["de/a.jsonl"]}
    assert chosen("hf://datasets/org/rows/en") == {"train": ["en/a.jsonl", "en/b.jsonl"]}
    assert chosen("hf://datasets/org/rows/de/a.jsonl") == {"train": ["de/a.jsonl"]}
    hub.add("datasets/org/rows", {"README.md": card(both)})
    assert chosen("org/rows") == {"train": ["de/a.jsonl", "en/a.jsonl"]}
    hub.add("datasets/org/rows", {"README.md": card(both, {**both, "config_name": "b"})})
    assert refused("org/rows").endswith(
        "has several configurations (all, b); give the folder or file of one: "
        f"hf://datasets/org/rows@{hub.repositories['datasets/org/rows'].refs['main']}/PATH, with "
        "a PATH such as de/a.jsonl"
    )
    hub.add("datasets/org/rows", {"README.md": card({"data_files": {"train": "../../x.jsonl"}})})
    assert "names '../../x.jsonl', and there is no file of rows of that name" in refused("org/rows")
    hub.add("datasets/org/rows", {"README.md": b"---\n: {[\n---"})
    assert len(chosen("org/rows")["train"]) == 3
    assert "x.py" not in hub.downloads()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("configs: " + "[" * 5000 + "]" * 5000, ""),
        ("configs: 3", ""),
        ("configs: {a: b}", ""),
        ("date: 2001-99-99", ""),
        ("configs: [{data_files: [{split: a, path: []}]}]", "names '', and there is no file"),
        ("configs: [{data_files: [{split: [x], path: {}}]}]", "names '', and there is no file"),
        ("configs: [{data_files: '%s'}]" % ("**/a/" * 40), "names '**/a/**/a/"),
        (
            "a: &a [x, x]\nb: &b [*a, *a]\n"
            "configs: [{config_name: *b, data_files: x}, {config_name: b, data_files: x}]",
            "has several configurations (, b)",
        ),
    ],
)
def test_a_card_of_something_else(hub: Hub, head: str, message: str) -> None:
    files = {"/".join(["a"] * 30) + ".jsonl": b"{}", **FILES}
    hub.add("datasets/org/rows", {**files, "README.md": f"---\n{head}\n---\n".encode()})
    if message:
        assert message in refused("org/rows")
    else:
        assert len(chosen("org/rows")["train"]) == 4


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("**/a", "a", True),
        ("**/a", "x/y/a", True),
        ("**", "x/y", True),
        ("x/**", "x/y/z", True),
        ("x/**", "x", False),
        ("x/**/z", "x/z", True),
        ("x/**/y/**/z", "x/1/y/2/3/z", True),
        ("x/**/y/**/z", "x/1/2/3/z", False),
        ("./*/b", "a/b", True),
        ("*", "a/b", False),
        ("**/**/a", "a", True),
    ],
)
def test_patterns_across_folders(pattern: str, path: str, fits: bool) -> None:
    assert _matches(path, pattern) is fits


@pytest.mark.parametrize("named", [3, {"a": 1}, "hf://datasets/org/rows", [3, None]])
def test_a_dataset_that_names_something_else(tmp_path: Path, named: object) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({FROM_HUB: named}))
    assert made_from(tmp_path) == []
    assert datasets_of(str(tmp_path), tmp_path) == []


def test_mistakes_are_named(hub: Hub) -> None:
    hub.add("datasets/org/rows", FILES)
    assert "has no split 'dev' (splits: train); choose with `split`" in refused("org/rows", "dev")
    assert "no files of rows lie there; there are de/a.jsonl, " in refused(
        "hf://datasets/org/rows/fr"
    )
    hub.add("datasets/org/script", {"script.py": b"evil", "dataset_infos.json": b"{}"})
    assert refused("org/script").endswith("try hf://datasets/org/script@refs/convert/parquet")
    assert "is neither a folder on this machine nor a rep" in refused("org/none", kind=HubError)


ROWS = [{"instruction": f"Which is {i}?", "response": f"It is {i}."} for i in range(9)]


def lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def documents(out: Path) -> dict[str, int]:
    dataset = open_dataset(out)
    held_out = dataset.validation
    return {
        "train": dataset.train.header.documents,
        "validation": 0 if held_out is None else held_out.header.documents,
    }


def test_a_dataset_keeps_the_commits_that_it_was_made_from(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"train.jsonl": lines(ROWS[:6]), "validation.jsonl": lines(ROWS[6:8])}
    rows = hub.add("datasets/org/rows", {**files, "test.jsonl": lines(ROWS[8:])})
    (tmp_path / "t").mkdir()
    tokenizer = llama2_tokenizer(tmp_path / "t")
    tokens = hub.add("org/base", tokenizer.parent, gated=False)
    made = llamax.prepare("org/rows", "out", template="dolly", tokenizer="org/base")
    assert documents(made.folder) == {"train": 6, "validation": 2}
    index = json.loads((tmp_path / "out/dataset.json").read_text())
    names = [f"hf://datasets/org/rows@{rows}", f"org/base@{tokens}"]
    assert index["from_hub"] == names
    assert (tmp_path / "out/tokenizer.model").read_bytes() == tokenizer.read_bytes()
    local = tmp_path / "rows"
    local.mkdir()
    for name, data in files.items():
        (local / name).write_bytes(data)
    same = llamax.prepare(local / "train.jsonl", "same", template="dolly", tokenizer=tokenizer,
                          validation_files=[local / "validation.jsonl"])  # fmt: skip
    for name in ("train.tokens", "validation.tokens"):
        assert (made.folder / name).read_bytes() == (same.folder / name).read_bytes()

    hub.add("datasets/org/rows", {"train.jsonl": lines(ROWS[:3])})
    again = llamax.prepare("org/rows", "out", template="dolly", tokenizer="org/base")
    assert documents(again.folder)["train"] == 6, "the dataset keeps its commit"
    newer = llamax.prepare("hf://datasets/org/rows@main", "new", template="dolly",
                           tokenizer=tokenizer, split="train[:2]", validation=0.0)  # fmt: skip
    assert documents(newer.folder) == {"train": 2, "validation": 0}
    text = llamax.prepare("org/rows", "text", key="response", tokenizer=tokenizer, validation=0.0)
    assert sum(documents(text.folder).values()) == 3, "text is the split train alone"


def test_a_failed_download_leaves_no_dataset(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("datasets/org/rows", {"train.parquet": b"rows" * 100})
    hub.other = {"train.parquet": b"?" * 400}
    tokenizer = llama2_tokenizer(tmp_path)
    with pytest.raises(HubError, match=r"train.parquet of hf://datasets/org/rows@\w+ arrived dam"):
        llamax.prepare("org/rows", tmp_path / "out", template="dolly", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="org/other is not on this machine and HF_HUB_OFFLINE is"):
        llamax.prepare("org/other", tmp_path / "out", template="dolly", tokenizer=tokenizer)
