"""``llamax inspect`` of LoRA checkpoints and adapter folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.adapters import hub_folder
from support.tiny_run import config, make_dataset

from llamax.checkpoint.listing import newest_checkpoint
from llamax.checkpoint.peft import (
    BASE_JSON,
    PeftFolder,
    adapter_info,
    export_adapter,
)
from llamax.checkpoint.reader import Checkpoint
from llamax.config.model import ModelConfig
from llamax.config.schema import FinetuneConfig
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.units import show_number
from llamax.tools.inspect import description
from llamax.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, and the run of its adapters."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "data").mkdir()
    cfg = config(make_dataset(folder / "data"), folder / "run")
    base = hub_folder(folder / "base", cfg.model)
    cfg = dataclasses.replace(
        cfg,
        checkpoint=dataclasses.replace(cfg.checkpoint, init_from=str(base), every=0),
        finetune=FinetuneConfig(method="lora", r=4, dropout=0.1),
        optim=dataclasses.replace(cfg.optim, lr=3e-2),
    )
    train(cfg, Rendezvous())
    return folder


def test_inspect_describes_an_adapter_checkpoint(run: Path) -> None:
    saved = Checkpoint(newest_checkpoint(run / "run") or "")
    found = {label: str(value) for label, value in description.describe(saved.folder)}
    whole = ModelConfig.from_hub(saved.model).num_parameters()
    assert found["model"].startswith(f"Llama of {show_number(whole)} parameters")
    about = adapter_info(saved)
    assert about is not None
    assert found["base"] == f"{about.base}, fingerprint {about.fingerprint[:12]}"
    assert found["adapters"].startswith(f"LoRA of rank {about.finetune.r}, alpha ")


def test_inspect_describes_an_adapter_folder(run: Path, tmp_path: Path) -> None:
    folder = export_adapter(Checkpoint(newest_checkpoint(run / "run") or ""), tmp_path / "adapter")
    found = {label: str(value) for label, value in description.describe(folder, verify=True)}
    about = PeftFolder(folder).info
    assert found["PEFT adapter"] == str(folder)
    assert found["base"] == f"{about.base}, fingerprint {about.fingerprint[:12]}"
    assert found["adapters"].startswith(f"LoRA of rank {about.finetune.r}, alpha ")
    assert found["adapters"].endswith(f" on {about.finetune.targets}")
    assert found["files"].startswith("1, ")
    assert found["verified"].startswith("nothing: ")
    (folder / BASE_JSON).unlink()
    assert dict(description.describe(folder))["base"] == about.base
