"""What others write and llamax reads: cards and lists of the Hub, compile caches, states."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import constants

from llamax.config.schema import OptimConfig
from llamax.data.prepare.hub_dataset import _configs, _splits_of, made_from
from llamax.optim.loss_scale import LossScale, LossScaleState
from llamax.optim.spikes import SpikeFilter
from llamax.runtime.errors import LlamaxError
from llamax.runtime.hub import _Cache
from llamax.runtime.hub_name import HubName
from llamax.runtime.json_reader import JsonError, read_object
from llamax.tools.audit.cache_place import Place
from llamax.tools.audit.compile_cache import NOTES, Note, read_notes
from llamax.tools.audit.shared_cache import check, lines, pull, push
from llamax.tools.push.model_card import datasets_of
from llamax.training.early_stopping import EarlyStopping
from support.fuzzing import shown

NAME = HubName("dataset", "org/rows", "0" * 40)
FILES = ["a/train.jsonl", "a/b/test.jsonl", "c.csv"]
CARD = """---
license: mit
configs:
- config_name: default
  default: true
  data_files:
  - {split: train, path: "a/*"}
  - {split: test, path: ["**/test.*", c.csv]}
---
# Rows
"""
COMPILER, DIGEST = "2.23.1", "a" * 64


def hub(folder: Path) -> None:
    """A card, a list of files in the Hub's cache, and the index of a dataset made from them."""
    (folder / "README.md").write_text(CARD)
    (folder / "dataset.json").write_text(json.dumps({"from_hub": ["hf://datasets/org/rows@main"]}))
    notes = folder / "datasets--org--rows" / "llamax"
    notes.mkdir(parents=True)
    (notes / f"{NAME.revision}.json").write_text(json.dumps({"c.csv": [5, DIGEST, "b" * 40]}))


def read_hub(folder: Path) -> None:
    for config in _configs(folder / "README.md"):
        if config.get("data_files"):
            for name, paths in _splits_of(NAME, config["data_files"], FILES).items():
                assert isinstance(name, str)
                assert set(paths) <= set(FILES)
    assert all(isinstance(name, str) for name in made_from(folder))
    datasets_of(str(folder), folder)
    before, constants.HF_HUB_CACHE = constants.HF_HUB_CACHE, str(folder)
    try:
        files = _Cache(NAME).files()
    finally:
        constants.HF_HUB_CACHE = before
    assert all(type(file.size) is int for file in (files or {}).values())


def compile_cache(folder: Path) -> None:
    """A place with one program, its note and its time."""
    module = folder / "local" / f"neuronxcc-{COMPILER}" / "MODULE_1+2"
    module.mkdir(parents=True)
    (module / "model.neff").write_bytes(b"program")
    (folder / "local" / NOTES).mkdir()
    note = {"neuronx-cc": COMPILER, "flags": "-O1", "kind": "step"}
    (folder / "local" / NOTES / f"{DIGEST}.json").write_text(json.dumps(note))
    push(folder / "local", Place(str(folder / "place")))
    time = folder / "place" / NOTES / f"neuronxcc-{COMPILER}" / "compile-time.json"
    time.write_text(json.dumps({"seconds": 4.5, "programs": 1}))


def read_compile_cache(folder: Path) -> None:
    place, outside = Place(str(folder / "place")), folder / "place.txt"
    outside.write_text("unchanged")
    found = check(place, {"step": DIGEST}, Note(COMPILER, "-O1"))
    shown(f"{found.entries} {found.time}")
    for line in lines(pull(place, folder / "new", COMPILER), "took", "here"):
        shown(line)
    for cache in ("local", "new"):
        for note in read_notes(folder / cache):
            shown(str(note.digest))
    assert {path.name for path in folder.iterdir()} <= {"local", "new", "place", "place.txt"}
    assert outside.read_text() == "unchanged"


def state(folder: Path) -> None:
    """What a checkpoint keeps of spikes, the loss scale and early stopping."""
    values = {
        "spikes": {"losses": [2.0, 1.5], "norms": [1.0, 0.5], "skipped": 3},
        **LossScaleState(1024.0, 5, 1).to_json(),
        "best_validation_loss": 1.25,
        "validations_waited": 2,
    }
    spikes = SpikeFilter(OptimConfig(skip_spikes="both", spike_window=8))
    assert spikes.state().keys() <= values.keys()
    (folder / "state.json").write_text(json.dumps(values))


def read_state(folder: Path) -> None:
    try:
        values = read_object(folder / "state.json")
    except JsonError as error:
        raise LlamaxError(str(error)) from None
    spikes = SpikeFilter(OptimConfig(skip_spikes="both", spike_window=8))
    spikes.load(values)
    assert torch.isfinite(spikes.window).all()
    spikes.bounds()
    stopping = EarlyStopping(3, values)
    assert stopping.over in (True, False)
    found = LossScaleState.from_json(values)
    if found is not None:
        scale = LossScale(found, torch.device("cpu"), 10)
        scale.update(torch.ones(1), torch.ones(1))
        assert torch.isfinite(scale.scale).all()
