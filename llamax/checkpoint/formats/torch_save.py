"""Files of torch.save and of torch_xla's serialization, and text files; disk errors are a line.

``torch.save`` writes a class by its name only where the class can be imported, so the structure of
an xser file, whose references are of a class of torch_xla, is written here: the pickle instructions
of plain containers and references, in the zip that torch.load reads.
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamax.checkpoint.atomic import explain_write_errors
from llamax.runtime.files import new_file

REFERENCE = b"ctorch_xla.utils.serialization\nTensorReference\n)\x81}"


def save_torch(path: Path, state: dict[Any, Any] | Tensor) -> None:
    """torch.save a dict or tensor, creating its folder.

    Raises NoRoom or CheckpointError if the disk refuses.
    """
    values = [state] if isinstance(state, Tensor) else state.values()
    needed_bytes = sum(value.nbytes for value in values if isinstance(value, Tensor))
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


def save_xser(path: Path, state: dict[str, Any]) -> None:
    """Write a dict as neuronx-distributed does with ``use_xser``: one file for each tensor.

    Raises NoRoom or CheckpointError if the disk refuses.
    """
    info: dict[Any, Any] = {}
    pickled = b"\x80\x02" + _pickled(state, path.with_name(path.name + ".tensors"), info) + b"."
    save_torch(path.with_name(path.name + ".info.pt"), info)
    with (
        explain_write_errors(path, len(pickled)),
        open(path, "wb", opener=new_file) as file,
        zipfile.ZipFile(file, "w") as archive,
    ):
        for name, data in (
            ("data.pkl", pickled),
            ("byteorder", b"little"),
            ("version", b"3\n"),
        ):
            archive.writestr(f"archive/{name}", data)


def _pickled(value: Any, folder: Path, info: dict[Any, Any]) -> bytes:
    """The instructions that build ``value``; its tensors are saved in ``folder``."""
    if isinstance(value, Tensor):
        number = len(info)
        info[number] = {
            "dtype": value.dtype,
            "shape": value.shape,
            "expert_model_parallel": False,
        }
        save_torch(folder / f"tensor_{number}.pt", value)
        return REFERENCE + _pickled("tid", folder, info) + _pickled(number, folder, info) + b"sb"
    if isinstance(value, dict):
        pairs = (part for pair in value.items() for part in pair)
        return b"}(" + b"".join(_pickled(part, folder, info) for part in pairs) + b"u"
    if isinstance(value, (list, tuple)):
        parts = b"".join(_pickled(part, folder, info) for part in value)
        return b"](" + parts + b"e" if isinstance(value, list) else b"(" + parts + b"t"
    if isinstance(value, str):
        text = value.encode()
        return b"X" + struct.pack("<I", len(text)) + text
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    assert isinstance(value, int), type(value)
    return b"J" + struct.pack("<i", value)
