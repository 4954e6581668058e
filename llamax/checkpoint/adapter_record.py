"""What a checkpoint of adapters records of them: how they were trained, and their base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from llamax.checkpoint.peft_settings import is_name, shown
from llamax.config.schema import FinetuneConfig
from llamax.config.toml import Problems, build
from llamax.runtime.errors import CheckpointError
from llamax.runtime.files import SHA256


class AdapterInfo(NamedTuple):
    """How adapters were trained, and the folder and fingerprint of their base ("" if unknown)."""

    finetune: FinetuneConfig
    base: str
    fingerprint: str

    def state(self) -> dict[str, Any]:
        """The entries for a checkpoint's state."""
        base = {"folder": self.base, "fingerprint": self.fingerprint}
        return {"finetune": asdict(self.finetune), "base": base}


def recorded(folder: Path, state: Mapping[str, Any]) -> AdapterInfo | None:
    """The description of adapters in the state of the checkpoint in ``folder``; None without one.

    Raises CheckpointError where llamax did not write it.
    """
    if "finetune" not in state:
        return None
    trained, base = state["finetune"], state.get("base")
    if not isinstance(trained, dict) or not isinstance(base, dict):
        missing = "base" if isinstance(trained, dict) else "finetune"
        raise CheckpointError(
            f"{folder}: its state has no table {missing}, as adapters need; save it again"
        )
    known, problems = {field.name for field in fields(FinetuneConfig)}, Problems()
    table = {name: value for name, value in trained.items() if name in known}
    finetune = build(FinetuneConfig, table, problems, "finetune")
    for line in (*problems.lines(finetune, "finetune"), *base_problems(base)):
        raise CheckpointError(f"{folder}: {line}; save it again")
    return AdapterInfo(finetune, base.get("folder") or "", base.get("fingerprint") or "")


def base_problems(base: Mapping[str, Any]) -> list[str]:
    """Everything in the description of a base that llamax did not write."""
    found = []
    if not is_name(folder := base.get("folder")):
        found.append(f"folder={shown(folder)} is not the name of a folder")
    printed = base.get("fingerprint")
    if printed and not (isinstance(printed, str) and SHA256.fullmatch(printed)):
        found.append(f"fingerprint={shown(printed)} is not a sha256")
    return found
