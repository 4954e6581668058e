"""Files of torch.save and small text files, with disk errors as one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamax.checkpoint.atomic import explain_write_errors
from llamax.runtime.files import new_file


def save_torch(path: Path, state: dict[str, Any]) -> None:
    """torch.save a dict, creating its folder; NoRoom or CheckpointError if the disk refuses."""
    needed_bytes = sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
    with explain_write_errors(path, needed_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb", opener=new_file) as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch's own, raised while it handles that of the disk
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise


def save_text(path: Path, text: str) -> None:
    """Write a text file, creating its folder; NoRoom or CheckpointError if the disk refuses."""
    with explain_write_errors(path, len(text)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", opener=new_file) as file:
            file.write(text)
