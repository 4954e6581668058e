"""Folders that a run names, found from wherever a command is started.

A run writes paths as its user did, so a relative one counts from the folder in which training was
started.  That folder is kept in every checkpoint (``STARTED_IN``); a tree that was moved as a whole
is searched from the checkpoint upwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llamax.checkpoint.hf_folder import has_tokenizer
from llamax.config.data_path import datasets_in
from llamax.config.load import config_in

STARTED_IN = "started_in"
CUT_FROM = "cut_from"  # the Hugging Face folder that shard has cut


def find_folder(named: str, beside: Path, state: Mapping[str, Any] | None = None) -> Path | None:
    """The folder that a file in ``beside`` names; None if it is not present.

    ``state`` is the state of a checkpoint.
    """
    return next((path for path in _candidates(named, beside, state or {}) if path.is_dir()), None)


def _candidates(named: str, beside: Path, state: Mapping[str, Any]) -> Iterator[Path]:
    path, home = Path(named), beside.absolute()
    if path.is_absolute():
        yield path
        path = Path(path.name)
    else:
        started_in = state.get(STARTED_IN)
        if isinstance(started_in, str):
            yield Path(started_in) / path
        yield path.absolute()
    if path.name:
        yield from (folder / path for folder in home.parents)


def cut_from(checkpoint: Path, state: Mapping[str, Any]) -> Path | None:
    """The Hugging Face folder of which ``shard`` made a checkpoint, if its tokenizer is there."""
    named = state.get(CUT_FROM)
    folder = find_folder(named, checkpoint) if isinstance(named, str) else None
    return folder if folder is not None and has_tokenizer(folder) else None


def dataset_of(checkpoint: Path, state: Mapping[str, Any] | None = None) -> Path | None:
    """The dataset folder that a checkpoint's configuration names; of a blend one that exists.

    None if it names none; a path that does not exist if the dataset is not present.
    """
    config = config_in(checkpoint)
    if config is None:
        return None
    parts = datasets_in(config.data.path)
    found = (find_folder(part, checkpoint, state) for part in parts)
    return next((path for path in found if path is not None), Path(parts[0]))
