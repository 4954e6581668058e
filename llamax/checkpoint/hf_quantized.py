"""Weights of a Hugging Face folder in bitsandbytes' 4 bits, made dense when they are read.

::

    X.weight                              two weights in a byte, the first in the high bits
    X.weight.absmax                       a scale for each block of 64 weights; fp32, or 8 bits
    X.weight.quant_map                    the 16 levels
    X.weight.nested_absmax, .nested_quant_map    double quantisation: the scales of the scales
    X.weight.quant_state.bitsandbytes__nf4       JSON: shape, dtype, block sizes, mean of scales

Blocks follow the elements in flat order, so a run of rows is made dense from its own bytes.  The
values equal those of bitsandbytes' ``dequantize_4bit``.

Source: bitsandbytes 0.50, ``functional.py`` (QuantState.as_dict, dequantize_4bit).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamax.checkpoint.runs import StridedCopy
from llamax.checkpoint.safetensors_io import TensorEntry, read_elements
from llamax.runtime.errors import CheckpointError
from llamax.runtime.json_reader import parse_object

STATE = ".quant_state.bitsandbytes__"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MAX_STATE_BYTES = 1 << 16
AT_ONCE = 1 << 22  # weights made dense at once: bounds the float32 copies

Entries = Mapping[str, tuple[Path, TensorEntry]]


@dataclass(frozen=True)
class PackedWeight:
    """A weight in 4 bits: where its bytes are, its levels, and how its scales are stored.

    ``helpers`` are the names of the tensors beside it.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    block: int
    levels: Tensor
    scales: tuple[Path, TensorEntry]
    nested: tuple[Tensor, Tensor, int, float] | None
    helpers: frozenset[str]

    def dense(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) in flat order, in ``dtype``."""
        found = torch.empty(stop - start, dtype=self.dtype)
        unit = self.block * 2  # whole blocks and whole bytes
        size = math.prod(self.shape)
        for at in range(start // unit * unit, stop, AT_ONCE // unit * unit):
            end = min(at + AT_ONCE // unit * unit, -(-stop // unit) * unit, size)
            packed = _read(self.path, self.offset, torch.uint8, at // 2, (end + 1) // 2)
            codes = torch.stack((packed >> 4, packed & 15), 1).flatten()[: end - at].int()
            scales = self._scales(at // self.block, -(-end // self.block))
            values = self.levels[codes] * scales.repeat_interleave(self.block)[: end - at]
            first, last = max(at, start), min(end, stop)
            found[first - start : last - start] = values[first - at : last - at].to(self.dtype)
        return found

    def _scales(self, start: int, stop: int) -> Tensor:
        path, entry = self.scales
        stored = _read(path, entry.offset, entry.dtype, start, stop)
        if self.nested is None:
            return stored
        levels, largest, block, mean = self.nested
        blocks = torch.arange(start, stop) // block
        return levels[stored.int()] * largest[blocks] + mean


def find_packed(entries: Entries) -> dict[str, PackedWeight]:
    """The weights in 4 bits among the tensors of a folder, by name.

    Raises CheckpointError if what describes one of them is missing or inconsistent.
    """
    found = {}
    for name, (path, entry) in entries.items():
        weight, mark, _ = name.partition(STATE)
        if mark:
            try:
                found[weight] = _packed(entries, weight, name, path, entry)
            except (KeyError, TypeError, ValueError, RecursionError, OverflowError):
                raise CheckpointError(
                    f"{path}: {weight[:80]} is in 4 bits of bitsandbytes, but {name[:80]} does "
                    "not describe it; download the folder again"
                ) from None
    return found


def _packed(
    entries: Entries, weight: str, name: str, path: Path, entry: TensorEntry
) -> PackedWeight:
    if entry.dtype != torch.uint8 or math.prod(entry.shape) > MAX_STATE_BYTES:
        raise ValueError
    text = _read(path, entry.offset, torch.uint8, 0, math.prod(entry.shape))
    state: dict[str, Any] = parse_object(bytes(text.tolist()))
    shape = tuple(_natural(n) for n in state["shape"])
    size, block = math.prod(shape), _natural(state["blocksize"])
    file, stored = entries[weight]
    scales = entries[f"{weight}.absmax"]
    blocks = -(-size // block)
    names = {name, f"{weight}.absmax", f"{weight}.quant_map"}
    nested = None
    if "nested_blocksize" in state:
        names |= {f"{weight}.nested_absmax", f"{weight}.nested_quant_map"}
        inner = _natural(state["nested_blocksize"])
        levels = _table(entries[f"{weight}.nested_quant_map"], 256)
        largest = _table(entries[f"{weight}.nested_absmax"], -(-blocks // inner))
        nested = (levels, largest, inner, float(state["nested_offset"]))
    kept_bytes = math.prod(stored.shape) * stored.dtype.itemsize
    expected = torch.float32 if nested is None else torch.uint8
    if kept_bytes < (size + 1) // 2 or math.prod(scales[1].shape) != blocks:
        raise ValueError
    if scales[1].dtype != expected:
        raise ValueError
    return PackedWeight(
        file,
        stored.offset,
        shape,
        DTYPES[state["dtype"]],
        block,
        _table(entries[f"{weight}.quant_map"], 16),
        scales,
        nested,
        frozenset(names),
    )


def _natural(number: object) -> int:
    if type(number) is not int or not 0 < number < 1 << 40:
        raise ValueError
    return number


def _table(at: tuple[Path, TensorEntry], length: int) -> Tensor:
    """A whole float32 vector of ``length`` numbers."""
    path, entry = at
    if entry.dtype != torch.float32 or math.prod(entry.shape) != length:
        raise ValueError
    return _read(path, entry.offset, entry.dtype, 0, length)


def _read(path: Path, offset: int, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of the vector that begins at byte ``offset``."""
    into = torch.empty(stop - start, dtype=dtype)
    at = offset + start * dtype.itemsize
    read_elements(path, at, [StridedCopy(1, len(into), 0, len(into), 0, len(into))], into)
    return into


def check_quantization(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError, which names the format, for weights that llamax cannot make dense."""
    settings = config.get("quantization_config")
    if not settings:
        return
    settings = settings if isinstance(settings, dict) else {}
    four = settings.get("load_in_4bit") or settings.get("_load_in_4bit")
    eight = settings.get("load_in_8bit") or settings.get("_load_in_8bit")
    method = settings.get("quant_method", "bitsandbytes" if four or eight else "unknown")
    if method == "bitsandbytes" and four:
        return
    detail = " in 8 bits (load_in_8bit)" if method == "bitsandbytes" else ""
    raise CheckpointError(
        f"{folder} holds weights quantised by {method!s:.40}{detail}, which llamax does not "
        "read; use the unquantized model, or save model.dequantize() of transformers"
    )
