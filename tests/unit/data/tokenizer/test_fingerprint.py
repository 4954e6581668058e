"""The fingerprint of a tokenizer changes with what changes ids, and with nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.instruction import llama2_tokenizer, llama3_tokenizer, prepare, write_rows

from llamax.data.dataset import open_dataset
from llamax.data.tokenizer.hf_export import export_tokenizer
from llamax.data.tokenizer.tokenizer import fingerprint_of_file, load_tokenizer
from llamax.runtime.errors import DataError

CONFIG = "tokenizer_config.json"


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value))


def printed(folder: Path) -> str:
    tokenizer = load_tokenizer(folder)
    assert fingerprint_of_file(tokenizer.path) == tokenizer.fingerprint
    return tokenizer.fingerprint


@pytest.fixture(params=["sentencepiece", "hf"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tokenizer, with nothing beside it."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    if request.param == "hf":
        llama3_tokenizer(folder)
        (folder / CONFIG).unlink()
    else:
        llama2_tokenizer(folder)
    return folder


def test_alone_it_is_the_sha256_of_the_file(home: Path) -> None:
    path = load_tokenizer(home).path
    assert printed(home) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_that_change_no_id_change_nothing(home: Path) -> None:
    before = printed(home)
    tokenizer = load_tokenizer(home)
    names = {number: name for name, number in tokenizer.special.items()}
    named = {"bos_token": names[tokenizer.bos_id], "eos_token": names[tokenizer.eos_id]}
    write(home, CONFIG, {**named, "model_max_length": 128, "chat_template": "{{ messages }}"})
    (home / "chat_template.jinja").write_text("{{ messages }}")
    assert printed(home) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda folder, size: write(
            folder, CONFIG, {"added_tokens_decoder": {size: {"content": "<x>", "special": True}}}
        ),
        lambda folder, size: write(folder, "added_tokens.json", {"<y>": size}),
        lambda folder, size: write(folder, CONFIG, {"additional_special_tokens": ["<z>"]}),
        lambda folder, size: write(folder, CONFIG, {"eos_token": "<|eot_id|>"}),
        lambda folder, size: write(folder, "special_tokens_map.json", {"bos_token": "</s>"}),
        lambda folder, size: write(folder, CONFIG, {"add_bos_token": False}),
    ],
    ids=["added", "older added", "special", "eos", "bos", "no bos"],
)
def test_files_that_change_ids_change_it(home: Path, change: Callable[[Path, int], None]) -> None:
    before = printed(home)
    states = {_ids(home)}
    change(home, load_tokenizer(home).vocab_size)
    states.add(_ids(home))
    assert (printed(home) != before) == (len(states) > 1)
    print_of_dataset = printed(shutil.copytree(home, home.with_name("copy")))
    assert print_of_dataset == printed(home)


def _ids(folder: Path) -> tuple[object, ...]:
    """What a text becomes, by everything that a sample may hold."""
    found = load_tokenizer(folder)
    ids = tuple(found.encode("a <x> <y> <z> b"))
    return (ids, tuple(found.special.items()), found.bos_id, found.eos_id, found.adds_bos)


@pytest.mark.parametrize("add_bos", [True, False])
def test_an_exported_sentencepiece_model_has_the_fingerprint_of_the_original(
    tmp_path: Path, add_bos: bool
) -> None:
    (tmp_path / "in").mkdir()
    llama2_tokenizer(tmp_path / "in")
    write(tmp_path / "in", CONFIG, {"add_bos_token": add_bos})
    export_tokenizer(load_tokenizer(tmp_path / "in"), tmp_path / "out")
    assert printed(tmp_path / "out") == printed(tmp_path / "in")


def test_a_dataset_whose_added_tokens_changed_is_refused(tmp_path: Path) -> None:
    folder = llama3_tokenizer(tmp_path / "tokenizer")
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "import os"}] * 20)
    out = prepare(tmp_path / "out", rows, "--tokenizer", folder, "--validation", "0")
    open_dataset(out)
    config = json.loads((out / CONFIG).read_text())
    write(out, CONFIG, {**config, "eos_token": "<|eot_id|>"})
    with pytest.raises(DataError, match=r"was not made with .* copy the tokenizer back"):
        open_dataset(out)
