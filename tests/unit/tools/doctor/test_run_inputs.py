"""The doctor on what training opens first: it refuses the same, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny_run import config as tiny_config
from support.tiny_run import make_dataset

from llamax.config.schema import Config
from llamax.runtime.errors import LlamaxError
from llamax.tools.doctor.finding import Finding
from llamax.tools.doctor.run_inputs import check
from llamax.training.folder_checks import check_run_folder
from llamax.training.inputs import open_inputs


def run_of(folder: Path, **changes: Any) -> Config:
    """A tiny run with relative paths, with ``section__key=value`` changed."""
    found = tiny_config(Path("data"), Path("run"))
    for name, value in changes.items():
        section, key = name.split("__")
        found = replace(found, **{section: replace(getattr(found, section), **{key: value})})
    return found


def findings(folder: Path, config: Config) -> list[Finding]:
    return list(check(folder, config, own_packages=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    make_dataset(tmp_path / "data")
    return tmp_path


def test_a_run_that_would_start_passes(folder: Path) -> None:
    found = findings(folder, run_of(folder))
    assert [(each.level, each.name) for each in found] == [("ok", "dataset"), ("ok", "start")]
    assert "; concat at 32: " in found[0].what
    assert "the run starts afresh" in found[1].what


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"model__vocab_size": 40}, "dataset"),
        ({"data__validation": "missing"}, "dataset"),
        ({"data__packing": "padded", "data__too_long": "refuse"}, "dataset"),
        (
            {"data__packing": "padded", "data__too_long": "drop", "data__sequence_length": 4},
            "dataset",
        ),
        ({"data__packing": "padded", "data__sequence_length": 4}, ""),
        ({"checkpoint__resume": "latest"}, "start"),
        ({"checkpoint__resume": "other/run"}, "start"),
        ({"run__folder": "data"}, "start"),
        ({"run__folder": "data/train.tokens"}, "start"),
        ({"finetune__method": "lora", "checkpoint__init_from": "base"}, "base"),
        ({"run__wandb": "offline"}, "reports"),
    ],
)
def test_what_training_refuses_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], name: str
) -> None:
    config = run_of(folder, **changes)
    monkeypatch.setattr("llamax.training.metrics.find_spec", lambda _: None)  # no wandb
    errors = [each for each in findings(folder, config) if each.level == "error"]
    monkeypatch.chdir(folder)
    if name == "reports":
        refused = ["run.wandb=offline needs"]
    else:
        refused = []
        try:
            check_run_folder(Path(config.run.folder))
            open_inputs(config)
        except LlamaxError as error:
            refused = [str(error)]
    assert bool(errors) == bool(refused), (errors, refused)
    assert [each.name for each in errors] == ([name] if refused else [])


def test_what_training_warns_of_is_a_warning(folder: Path) -> None:
    (folder / "data" / "validation.tokens").unlink()
    found = findings(folder, run_of(folder, data__global_batch=400))
    warnings = [each for each in found if each.level == "warning"]
    assert [each.what.partition(":")[0] for each in warnings] == [
        "every step repeats samples",
        "nothing will be validated",
    ]
    assert warnings[1].fix.startswith("prepare it with a larger --validation")


def test_a_folder_of_something_else_is_no_run_folder(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(json.dumps({}))
    (error,) = (each for each in findings(folder, run_of(folder)) if each.level == "error")
    assert "is the folder of a model" in error.what
    assert error.fix.startswith("set run.folder to another folder")


def test_packages_of_reports_are_unknown_away_from_the_node(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamax.training.metrics.find_spec", lambda _: None)
    config = run_of(folder, run__tensorboard=True)
    *_, found = check(folder, config, own_packages=False)
    assert (found.level, found.name) == ("unknown", "reports")
    assert "run.tensorboard=true needs the package tensorboard" in found.what
