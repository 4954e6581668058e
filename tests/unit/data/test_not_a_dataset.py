"""A path that holds no dataset: the error says what it is instead, and what to do."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from support import tiny_run

from llamax.data.dataset import open_dataset
from llamax.runtime.errors import DataError

MAKE = "make one of it: llamax prepare {path} --tokenizer TOKENIZER --out DATA"
EXPECTED = {
    "none": "there is no such folder, and no none.idx; make it: llamax prepare INPUT --tokenizer "
    "TOKENIZER --out {path}",
    "text": f"it has no dataset.json; {MAKE}",
    "text/a b.txt": f"it is a file; {MAKE}",
    "data/train.tokens": "it is a file of one; give the folder, {parent}",
    "hub": "it is the folder of a model; give one that llamax prepare made",
    "run": "it is the folder of a run; give one that llamax prepare made",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_error_says_what_it_is_and_what_to_do(tmp_path: Path, name: str) -> None:
    for folder in ("text", "data", "hub", "run/checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
    tiny_run.make_dataset(tmp_path / "data")
    (tmp_path / "hub" / "config.json").touch()
    (tmp_path / "text" / "a b.txt").touch()
    path = tmp_path / name
    with pytest.raises(DataError) as raised:
        open_dataset(path)
    what = EXPECTED[name].format(path=shlex.quote(str(path)), parent=path.parent)
    assert str(raised.value) == f"{path}: is not a dataset: {what}"


@pytest.mark.parametrize("between", [" ", ",", ", "])
def test_several_datasets_are_a_blend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, between: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("web", "books"):
        (tmp_path / folder).mkdir()
    says = "names several; blend them with a weight before each: 0.5 web 0.5 books$"
    with pytest.raises(DataError, match=says):
        open_dataset(f"web{between}books")


def test_an_unfinished_dataset_is_named(tmp_path: Path) -> None:
    (tmp_path / ".parts").mkdir()
    with pytest.raises(DataError, match=r"is not finished; give the same llamax prepare --out /.*"):
        open_dataset(tmp_path)
