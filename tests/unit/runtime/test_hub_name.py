"""Names on the Hub where a path could stand, judged by huggingface_hub's own grammar."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamax.runtime.errors import ConfigError
from llamax.runtime.hub_name import HubName, Kind, hub_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name", HubName("model", "org/name")),
        ("meta-llama/Llama-2-7b-hf", HubName("model", "meta-llama/Llama-2-7b-hf")),
        ("org/name@v1.0", HubName("model", "org/name", "v1.0")),
        (f"org/name@{COMMIT}", HubName("model", "org/name", COMMIT)),
        ("org/name@refs/pr/3", HubName("model", "org/name", "refs/pr/3")),
        ("hf://org/name", HubName("model", "org/name")),
        ("hf:/org/name@main", HubName("model", "org/name", "main")),  # as pathlib shortens it
        ("hf://models/org/name", HubName("model", "org/name")),
        ("hf://org/name@refs%2Fpr%2F3", HubName("model", "org/name", "refs/pr/3")),
        ("models/Llama-2-7b-hf", None),  # the Hub has no owner of that name
        ("./org/name", None),
        ("/org/name", None),
        ("../org/name", None),
        ("a/b/c", None),
        ("base", None),
        ("", None),
        ("out/tokenizer.model", None),
        ("rows/train.jsonl", None),
        ("a--b/c", None),
        ("a..b/c", None),
        ("org/name@../../x", None),
        ("org/näme", None),
        ("org/name\n", None),
    ],
)
def test_what_names_the_hub(text: str, name: HubName | None, tmp_path: Path) -> None:
    assert hub_name(text, within=tmp_path) == name
    if name is not None:
        assert hub_name(str(name), within=tmp_path) == name


def test_a_path_that_exists_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "org/name").mkdir(parents=True)
    (tmp_path / "org/link").symlink_to("nowhere")
    assert hub_name("org/name", within=tmp_path) is None
    assert hub_name("org/link", within=tmp_path) is None
    assert hub_name("hf://org/name", within=tmp_path) == HubName("model", "org/name")
    assert hub_name("org/name@v1", within=tmp_path) == HubName("model", "org/name", "v1")


@pytest.mark.parametrize(
    "text", ["org/name", "org/name@v2", "org/name@v2/data", "org/name/data/train.parquet"]
)
def test_datasets_are_named_as_fsspec_names_them(text: str) -> None:
    ours = hub_name(f"hf://datasets/{text}", "dataset")
    assert ours is not None
    from huggingface_hub import parse_hf_uri

    theirs = parse_hf_uri(f"hf://datasets/{text}")
    assert (ours.repo, ours.revision or None, ours.path) == (
        theirs.id,
        theirs.revision,
        theirs.path_in_repo,
    )


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("hf://", "model", "names no repository of the Hub; write hf://org/name@REVISION or hf:"),
        ("hf://name", "model", "names no repository"),
        ("hf://org/name@a/../../b", "model", "names no repository"),
        ("hf://org/name@%2e%2e", "model", "names no repository"),
        ("hf://datasets/org/name", "model", "names a dataset, and a model is needed: hf://org/na"),
        ("hf://org/name", "dataset", "names a model, and a dataset is needed: hf://datasets/org"),
        (
            "hf://datasets/squad",
            "dataset",
            "no repository of the Hub; write hf://datasets/org/name",
        ),
        ("hf://models/name", "model", "names no repository of the Hub; write hf://org/name@REVI"),
        ("hf://org/name/config.json", "model", "names a file of a repository; write hf://org/name"),
    ],
)
def test_what_names_nothing_is_refused(text: str, kind: Kind, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hub_name(text, kind)
