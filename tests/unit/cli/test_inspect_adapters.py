"""``llamax inspect`` of LoRA checkpoints and adapter folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tuned_run import tuned_run

from llamax.checkpoint.listing import newest_checkpoint
from llamax.checkpoint.peft import (
    BASE_JSON,
    PeftFolder,
    adapter_info,
    export_adapter,
)
from llamax.checkpoint.reader import Checkpoint
from llamax.config.model import ModelConfig
from llamax.runtime.units import show_number
from llamax.tools.inspect import description


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, and the run of its adapters."""
    return tuned_run(tmp_path_factory.mktemp("lora"))


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
