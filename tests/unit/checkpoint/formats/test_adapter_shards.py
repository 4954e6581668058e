"""Adapters as optimum-neuron's trainer saves them are refused by what joins them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamax.checkpoint.formats.convert import import_checkpoint
from llamax.checkpoint.hf_folder import open_source
from llamax.checkpoint.peft import open_adapter
from llamax.runtime.errors import CheckpointError


@pytest.mark.parametrize("inside", [".", "adapter_poet", "adapter_poet/adapter_shards"])
@pytest.mark.parametrize(
    "read", [open_source, open_adapter, lambda path: import_checkpoint(path, path / "new")]
)
def test_shards_of_adapters(tmp_path: Path, inside: str, read: Callable[[Path], Any]) -> None:
    out = tmp_path / "out"
    (out / "adapter_poet" / "adapter_shards" / "model").mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (out / "adapter_poet" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError) as refused:
        read(out / inside)
    assert str(refused.value) == (
        f"{out}/adapter_poet/adapter_shards holds adapters in shards of optimum-neuron, which "
        f"llamax does not read; join them with `optimum-cli neuron consolidate {out} PEFT`, and "
        "copy adapter_poet/adapter_config.json to PEFT"
    )
