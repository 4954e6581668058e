"""Training on Megatron's files as they lie, on a blend, and on what ``prepare`` writes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.corpora import python_sources, train_unlike_llama
from support.tiny_run import config, log_of

from llamax.cli.consolidate import main as consolidate
from llamax.cli.prepare import main as prepare
from llamax.config.schema import Config, DataConfig
from llamax.data.dataset import open_dataset
from llamax.data.megatron import IndexedFile
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.inference.engine import open_model
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import DataError, LlamaxError
from llamax.runtime.files import sha256
from llamax.train import train
from llamax.training.inputs import open_inputs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset in Megatron's format, of a few of Python's modules."""
    folder = tmp_path_factory.mktemp("megatron")
    (folder / "text").mkdir()
    for number, text in enumerate(python_sources(6)):
        (folder / "text" / f"{number}.txt").write_text(text[:4000], encoding="utf-8")
    out = ["--out", str(folder / "out"), "--format", "megatron", "--append-eod"]
    tokenizer = ["--tokenizer", str(train_unlike_llama(folder))]
    prepare([str(folder / "text"), *out, *tokenizer, "--workers", "2", "--validation", "0.3"])
    return folder


def run(made: Path, folder: Path, path: str, **data: str) -> Config:
    base = config(made, folder)
    return replace(
        base,
        model=replace(base.model, vocab_size=600),
        data=replace(base.data, path=path, **data),
        checkpoint=replace(base.checkpoint, every=0),
    )


def test_documents_are_the_tokenizers_with_an_end_and_no_beginning(made: Path) -> None:
    tokenizer = load_tokenizer(made / "out")
    texts = [path.read_text() for path in sorted((made / "text").glob("*.txt"))]
    wanted = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    files = [IndexedFile(made / "out" / f"{s}_text_document") for s in ("train", "validation")]
    found = [file.sequence(i).tolist() for file in files for i in range(len(file.lengths))]
    assert sorted(found) == sorted(wanted)
    train = [found[i] for i in range(len(files[0].lengths))]
    assert train == [document for document in wanted if document in train]  # in their order


def test_a_folder_a_prefix_and_a_blend_train(made: Path, tmp_path: Path) -> None:
    folder, prefix = made / "out", made / "out" / "train_text_document"
    held_out = str(made / "out" / "validation_text_document")
    train(run(made, tmp_path / "a", str(folder)), Rendezvous())
    train(run(made, tmp_path / "b", str(prefix), validation=held_out), Rendezvous())
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")
    assert log_of(tmp_path / "a")[-1]["validation_loss"] > 0
    train(run(made, tmp_path / "c", f"0.3 {prefix} 0.7 {folder}"), Rendezvous())
    assert log_of(tmp_path / "c")[-1]["loss"] < log_of(tmp_path / "c")[0]["loss"]
    consolidate([str(tmp_path / "c"), "--out", str(tmp_path / "hub")])
    assert load_tokenizer(tmp_path / "hub").bos_id == load_tokenizer(folder).bos_id


def test_a_run_on_a_prefix_has_the_tokenizer_that_prepare_kept_beside_it(
    made: Path, tmp_path: Path
) -> None:
    prefix = made / "out" / "train_text_document"
    train(run(made, tmp_path / "a", str(prefix)), Rendezvous())
    assert (
        open_model(tmp_path / "a").tokenizer.fingerprint == load_tokenizer(made / "out").fingerprint
    )
    (tmp_path / "alone").mkdir()
    for end in (".bin", ".idx"):
        shutil.copy(f"{prefix}{end}", tmp_path / "alone")
    alone = tmp_path / "alone" / prefix.name
    train(run(made, tmp_path / "b", str(alone)), Rendezvous())
    with pytest.raises(DataError, match=r"files .*, which do not name their tokenizer; use `tok"):
        open_model(tmp_path / "b")


def test_validation_data_of_another_tokenizer_is_named_with_the_training_data(
    made: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(made / "out", other)
    tokenizer = other / "tokenizer.model"
    tokenizer.write_bytes(tokenizer.read_bytes() + b" ")
    said = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps({**said, "tokenizer": sha256(tokenizer)}))
    mixed = run(made, tmp_path / "a", str(made / "out"), validation=str(other))
    with pytest.raises(DataError) as error:
        open_inputs(mixed)
    assert f"{other}: made with tokenizer {sha256(tokenizer)[:12]}" in str(error.value)
    assert f"but {made / 'out'} was made with tokenizer {said['tokenizer'][:12]}" in str(
        error.value
    )


def test_a_blend_knows_its_tokenizer_in_any_order(made: Path) -> None:
    folder, prefix = made / "out", made / "out" / "train_text_document"
    for blend in (f"0.3 {prefix} 0.7 {folder}", f"0.7 {folder} 0.3 {prefix}"):
        mixed = open_dataset(blend)
        assert mixed.fingerprint == load_tokenizer(folder).fingerprint
        assert mixed.tokenizer_path == folder / "tokenizer.model"


def test_a_model_with_too_small_a_vocabulary_is_refused(made: Path, tmp_path: Path) -> None:
    prefix = str(made / "out" / "train_text_document")
    small = run(made, tmp_path, prefix)
    small = replace(small, model=replace(small.model, vocab_size=300))
    with pytest.raises(LlamaxError, match=r"outside model\.vocab_size=300"):
        train(small, Rendezvous())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--template", "alpaca"], "--format=megatron cannot store which tokens are answers"),
        (["--format", "llamax"], "in the other format"),
    ],
)
def test_formats_do_not_mix(made: Path, more: list[str], said: str) -> None:
    command = [str(made / "text"), "--out", str(made / "out"), "--format", "megatron"]
    with pytest.raises(DataError, match=said):
        prepare([*command, "--tokenizer", str(made / "m.model"), "--validation", "0.3", *more])


def test_data_names_its_validation() -> None:
    assert DataConfig().validation == ""
