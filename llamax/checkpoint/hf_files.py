"""The weight files of a Hugging Face folder, and where each tensor's elements lie in them.

::

    model.safetensors                          transformers
    model.safetensors.index.json               transformers: it names the files
    model-00001-of-00002.safetensors           torch's HuggingFaceStorageWriter, without an index
    shard-00001-model-00001-of-00001....       the same, transformers' distributed_checkpoint: each
                                               rank's part of every tensor, with its offsets
    X.weight, X.weight.absmax, X.weight.quant_state.bitsandbytes__nf4 ...
                                               a weight in 4 bits: ``hf_quantized``

Source: torch 2.13, ``distributed/checkpoint/_hf_utils.py``; transformers 5.23,
``distributed/checkpoint.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from llamax.checkpoint.hf_quantized import PackedWeight, find_packed
from llamax.checkpoint.manifest_index import tiles
from llamax.checkpoint.runs import Run, whole_run
from llamax.checkpoint.safetensors_io import TensorEntry, read_header, read_metadata
from llamax.checkpoint.source import Piece
from llamax.runtime.errors import CheckpointError
from llamax.runtime.json_reader import parse_json

NUMBERED = re.compile(r"(?!shard-)(.+)-(\d{5})-of-(\d{5})\.safetensors")
SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
OFFSETS = "DCP_SHARDING_INFO"


class StoredWeight(NamedTuple):
    """A tensor of a folder: its pieces in the files, or its form in 4 bits."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[Piece]
    packed: PackedWeight | None = None


class _Part(NamedTuple):
    """A block of a tensor in a file; ``offsets``: of its first element in the tensor."""

    path: Path
    entry: TensorEntry
    offsets: tuple[int, ...]


def names_without_index(folder: Path) -> list[str]:
    """The weight files of a folder that has neither model.safetensors nor an index.

    Raises CheckpointError if one of the files of a numbered set is missing.
    """
    names = sorted(path.name for path in folder.iterdir())
    numbered = [match for name in names if (match := NUMBERED.fullmatch(name))]
    if not numbered:
        return [name for name in names if SHARD.fullmatch(name)]
    sets = {(match[1], match[3]) for match in numbered}
    if len(sets) > 1:
        found = ", ".join(f"{stem}-*-of-{count}" for stem, count in sorted(sets))
        raise CheckpointError(f"{folder} has several sets of weights: {found}; keep one")
    ((stem, count),) = sets
    wanted = [f"{stem}-{n:05d}-of-{count}.safetensors" for n in range(1, int(count) + 1)]
    if missing := [name for name in wanted if name not in names]:
        raise CheckpointError(
            f"{folder} has {len(numbered)} of {count} files of weights; {missing[0]} is missing: "
            "copy it too"
        )
    return wanted


def read_weights(paths: Iterable[Path]) -> dict[str, StoredWeight]:
    """The tensors of all files by name.

    Raises CheckpointError if a file is damaged, if two files have the same tensor, unless each is
    a rank's part of the weights, or if the parts of a tensor do not make a whole one.
    """
    parts: dict[str, dict[tuple[int, ...], _Part]] = {}
    for path in paths:
        offsets = _offsets(path) if SHARD.fullmatch(path.name) else {}
        for name, entry in read_header(path).items():
            at = offsets.get(name, (0,) * len(entry.shape))
            known = parts.setdefault(name, {})
            if len(at) != len(entry.shape) or any(len(at) != len(other) for other in known):
                raise _not_whole(path.parent, name)
            if at in known and not (offsets and SHARD.fullmatch(known[at].path.name)):
                raise CheckpointError(
                    f"{path.parent}: {known[at].path.name} and {path.name} both have {name[:80]}; "
                    "keep the files of one checkpoint"
                )
            known[at] = _Part(path, entry, at)
    whole = {name: [*known.values()] for name, known in parts.items()}
    packed = find_packed({name: (ps[0].path, ps[0].entry) for name, ps in whole.items()})
    helpers = {helper for weight in packed.values() for helper in weight.helpers}
    weights = {}
    for name, found in whole.items():
        if name in packed:
            weights[name] = StoredWeight(packed[name].dtype, packed[name].shape, [], packed[name])
        elif name not in helpers:
            weights[name] = _joined(name, found)
    return weights


def _joined(name: str, parts: list[_Part]) -> StoredWeight:
    first = parts[0]
    dims = range(len(first.offsets))
    shape = tuple(max(p.offsets[dim] + p.entry.shape[dim] for p in parts) for dim in dims)
    if len(parts) == 1 and not any(first.offsets):
        piece = Piece(first.path, first.entry.offset, whole_run(shape))
        return StoredWeight(first.entry.dtype, shape, [piece])
    inner = whole_run(shape[1:]).width if len(shape) > 1 else 1
    pieces = []
    for part in parts:
        sizes = part.entry.shape
        columns = sizes[1] if len(shape) > 1 else 1
        if part.entry.dtype != first.entry.dtype or sizes[2:] != shape[2:]:
            raise _not_whole(part.path.parent, name)
        left = part.offsets[1] if len(shape) > 1 else 0
        width = columns * inner
        run = Run(left * inner, width, part.offsets[0] * width, sizes[0] * width)
        pieces.append(Piece(part.path, part.entry.offset, run))
    if not tiles(shape, np.array(sorted((0, *piece.run) for piece in pieces))):
        raise _not_whole(first.path.parent, name)
    return StoredWeight(first.entry.dtype, shape, pieces)


def _offsets(path: Path) -> Mapping[str, tuple[int, ...]]:
    """The offsets of a shard's tensors, from the text that torch keeps beside them."""
    try:
        stated = parse_json(read_metadata(path)[OFFSETS])
        offsets = {name: tuple(entry["saved_offsets"]) for name, entry in stated.items()}
        if all(type(n) is int and n >= 0 for at in offsets.values() for n in at):
            return offsets
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    raise CheckpointError(
        f"{path} is one rank's part of the weights, but does not state which: it has no "
        f"{OFFSETS}; join the parts with transformers' consolidate_distributed_checkpoint"
    )


def _not_whole(folder: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: the parts of {name[:80]} in its files make no whole tensor; copy all files "
        "shard-*.safetensors of one checkpoint"
    )
