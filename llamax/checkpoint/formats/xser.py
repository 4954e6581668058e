"""Files of torch_xla's serialization ("xser"): one file per tensor beside that of the structure.

::

    X.pt                     the structure, with a reference (a number) in place of each tensor
    X.pt.tensors/tensor_5.pt tensor 5
    X.pt.info.pt             neuronx-distributed: the dtype and shape of every tensor

neuronx-distributed and neuronx-nemo-megatron write it.  A file without references is an ordinary
file of torch.save.

Source: torch_xla 2.9, ``utils/serialization.py``; neuronx_distributed 0.17,
``trainer/checkpoint.py``; neuronx-nemo-megatron 2.21, ``nlp/parts/serialization.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from llamax.checkpoint.formats import torch_zip
from llamax.checkpoint.formats.base import check_inside
from llamax.checkpoint.formats.torch_pickle import InertObject, XlaReference
from llamax.checkpoint.formats.torch_zip import StoredTensor
from llamax.runtime.errors import CheckpointError

LEFT_OUT = -1  # the offset of a tensor that is not in its file
MOST_ENTRIES = 2**20  # of the dicts in a file
IGNORED_SUFFIXES = (".inv_freq", "rope.freqs", "._extra_state")


def load_file(folder: Path, path: Path) -> Mapping[Any, Any]:
    """The dict in a rank's file, with the tensors of either serialization.

    Raises CheckpointError if a file is missing, damaged, or links out of ``folder``.
    """
    values = torch_zip.as_dict(torch_zip.load(check_inside(folder, path)), path)
    tensors = path.with_name(path.name + ".tensors")
    info_path = path.with_name(path.name + ".info.pt")
    info: Mapping[Any, Any] = {}
    if info_path.exists():
        info = torch_zip.as_dict(torch_zip.load(check_inside(folder, info_path)), info_path)

    def locate(reference: XlaReference) -> StoredTensor:
        file = tensors / f"tensor_{reference.tid}.pt"
        entry = info.get(reference.tid)
        if not file.exists() and isinstance(entry, dict):
            dtype, shape = entry.get("dtype"), entry.get("shape")
            sizes = shape if isinstance(shape, tuple) else ("none",)
            if isinstance(dtype, torch.dtype) and all(type(n) is int and n > 0 for n in sizes):
                return StoredTensor(file, LEFT_OUT, dtype, 0, sizes, ())
        tensor = torch_zip.load(check_inside(folder, file))
        if not isinstance(tensor, StoredTensor):
            raise CheckpointError(f"{file} holds no tensor; copy it again")
        return tensor

    filled: Mapping[Any, Any] = torch_zip.replace_values(values, XlaReference, locate)
    return filled


def stored_tensors(values: Mapping[Any, Any], path: Path) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors in nested dicts, with the keys joined by dots; other values are skipped.

    Raises CheckpointError, which names ``path``, for a tensor of a kind that llamax does not read,
    and for dicts that contain each other so often that they have more than ``MOST_ENTRIES``.
    """
    left = MOST_ENTRIES

    def walk(values: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, StoredTensor]]:
        nonlocal left
        left -= len(values)
        if left < 0:
            raise CheckpointError(
                f"{path} holds more than {MOST_ENTRIES} values; save a state_dict alone"
            )
        for key, value in values.items():
            name = f"{prefix}{key}"
            if isinstance(value, StoredTensor):
                yield name, value
            elif isinstance(value, dict):
                yield from walk(value, f"{name}.")
            elif name.endswith(IGNORED_SUFFIXES) or not isinstance(value, InertObject):
                continue
            elif value.tensor:
                raise CheckpointError(
                    f"{path}: {name[:80]} is {value.name}, which llamax does not read; save it as "
                    "a plain tensor of a floating-point type"
                )

    yield from walk(values, "")
