"""What lies at a path that holds no dataset, and how to get one: the error of ``open_dataset``."""

from __future__ import annotations

import os
import re
from glob import escape
from pathlib import Path

from llamax.config.constants import CHECKPOINTS_FOLDER
from llamax.runtime.errors import DataError, join_or
from llamax.runtime.text import in_shell


def not_a_dataset(path: Path) -> DataError:
    """The error for a path at which ``open_dataset`` finds nothing that it reads."""
    if path.suffix in (".idx", ".bin") and path.is_file():
        return DataError(f"{path}: name a Megatron dataset by its prefix, {path.with_suffix('')}")
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return DataError(
            f"{path}: is a folder that the package datasets wrote; prepare its rows: llamax "
            f"prepare {in_shell(path)} --out DATA"
        )
    if (path / ".parts").is_dir():
        return DataError(
            f"{path}: is not finished; give the same llamax prepare --out {in_shell(path)} again"
        )
    return DataError(f"{path}: is not a dataset: {_instead(path)}")


def _instead(path: Path) -> str:
    """What a path is instead of a dataset, and what to do."""
    made = f"make one of it: llamax prepare {in_shell(path)} --tokenizer TOKENIZER --out DATA"
    if path.is_file():
        if (path.parent / "dataset.json").is_file():
            return f"it is a file of one; give the folder, {path.parent}"
        return f"it is a file; {made}"
    if near := _prefixes_near(path):
        return f"there is no {path.name}.idx; did you mean {join_or(near)}?"
    words = re.split(r"[,\s]+", str(path))
    if len(words) > 1 and all(map(os.path.exists, words)):
        blend = " ".join(f"{1 / len(words):.2g} {word}" for word in words)
        return f"it names several; blend them with a weight before each: {blend}"
    if not path.is_dir():
        return (
            f"there is no such folder, and no {path.name}.idx; make it: llamax prepare INPUT "
            f"--tokenizer TOKENIZER --out {in_shell(path)}"
        )
    for name, kind in (("config.json", "model"), (CHECKPOINTS_FOLDER, "run")):
        if (path / name).exists():
            return f"it is the folder of a {kind}; give one that llamax prepare made"
    return f"it has no dataset.json; {made}"


def _prefixes_near(path: Path) -> list[str]:
    """Prefixes of Megatron datasets that are in a folder, or begin with a path; at most 4."""
    inside = path.is_dir()
    folder, pattern = (path, "*.idx") if inside else (path.parent, f"{escape(path.name)}*.idx")
    return [str(found.with_suffix("")) for found in sorted(folder.glob(pattern))[:4]]
