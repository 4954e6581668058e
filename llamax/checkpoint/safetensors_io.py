"""Reading and writing safetensors files: a length, a JSON header, raw bytes.

::

    [8 bytes: n][n bytes: {"name": {"dtype", "shape", "data_offsets": [from, to]}, ...}][data]

The safetensors library is not used, because a checkpoint needs three things more: a file is hashed
while it streams to the disk; any run of a tensor is read without the rest; and a header is checked
before memory is allocated for what it claims.
Format: https://github.com/huggingface/safetensors (Format).
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llamax.checkpoint.atomic import explain_write_errors
from llamax.checkpoint.checksums import (
    BlockHasher,
    BlockVerifier,
    Bytes,
    check_length,
    open_to_read,
    read_exactly,
)
from llamax.checkpoint.runs import StridedCopy
from llamax.checkpoint.safetensors_header import DTYPE_NAMES, MAX_HEADER_BYTES
from llamax.runtime.errors import CheckpointError
from llamax.runtime.files import new_file, plain_file, same_file, sync_handle
from llamax.runtime.json_reader import JsonError, parse_object
from llamax.runtime.mapping import map_file

DTYPES: dict[str, torch.dtype] = {tag: getattr(torch, name) for tag, name in DTYPE_NAMES.items()}
TAGS = {dtype: tag for tag, dtype in DTYPES.items()}
SLAB_BYTES = 16 << 20
WINDOW_BYTES = 4 << 20
SYNC_BYTES = 64 << 20
WRITE_BYTES = 1 << 20  # ext4 is up to ten times slower with writes of 16 MiB
MAX_DIMS = 16


Progress = Callable[[int], object]  # called with the number of bytes just done


Started = Callable[[int, str], object]  # called with the amount of work and its unit


def no_progress(size_bytes: int) -> None:
    """The ``Progress`` that reports nothing."""


def no_start(amount: int, unit: str) -> None:
    """The ``Started`` that reports nothing."""


class TensorEntry(NamedTuple):
    """A tensor in a file; ``offset`` counts bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class TensorStream(NamedTuple):
    """A tensor to write: its elements come in flat chunks, made when they are asked for."""

    name: str
    dtype: torch.dtype
    shape: Sequence[int]
    chunks: Iterable[Tensor]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class WrittenFile(NamedTuple):
    """The size of a file just written, of its header, and its block checksums (``checksums``)."""

    size_bytes: int
    header_bytes: int
    sums: bytes


def as_bytes(tensor: Tensor) -> Bytes:
    """The bytes of a contiguous host tensor, sharing its memory."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name, checked against the file's size.

    Raises CheckpointError if the file is missing or cut short, or its header is inconsistent.
    """

    def broken(why: str) -> CheckpointError:
        return CheckpointError(f"{path} is not a complete safetensors file: {why}; copy it again")

    try:
        with open(path, "rb", opener=plain_file) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise broken(f"its header claims {length} of {size} bytes")
            header = parse_object(file.read(length))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except JsonError as error:
        raise broken(f"its header {error}") from None
    header.pop("__metadata__", None)
    found, extents = {}, []
    for name, entry in header.items():
        label = name if name.isprintable() and len(name) < 100 else f"{name!r:.80}"
        try:
            tag, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, start, stop]
        except (TypeError, KeyError, ValueError):
            raise broken(f"the entry of {label} is malformed") from None
        if not isinstance(tag, str) or tag not in DTYPES:
            dtype = tag if isinstance(tag, str) and tag.isidentifier() else f"{tag!r:.40}"
            raise CheckpointError(
                f"{path}: {label} has dtype {dtype:.40}, which llamax does not read; it reads "
                f"{', '.join(DTYPES)}"
            )
        if len(shape) > MAX_DIMS or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise broken(f"{label} has the invalid shape {shape!s:.80} at {[start, stop]!s:.80}")
        if stop - start != math.prod(shape) * DTYPES[tag].itemsize:
            raise broken(f"{label} {tag}{shape!s:.80} does not fit its {stop - start} bytes")
        found[name] = TensorEntry(DTYPES[tag], tuple(shape), 8 + length + start)
        extents.append((start, stop))
    at = 0
    for start, stop in sorted(extents):
        if start != at:
            raise broken(f"its tensors leave a gap or overlap at byte {at}")
        at = stop
    if at != size - 8 - length:
        raise broken(f"its tensors end at byte {8 + length + at}, the file has {size}")
    return found


def read_metadata(path: Path) -> dict[str, str]:
    """The texts beside the tensors of a file that ``read_header`` accepts."""
    with open(path, "rb", opener=plain_file) as file:
        length = min(int.from_bytes(file.read(8), "little"), MAX_HEADER_BYTES)
        try:
            metadata = parse_object(file.read(length)).get("__metadata__")
        except JsonError:
            return {}
    return metadata if isinstance(metadata, dict) else {}


def read_elements(
    path: Path,
    offset: int,
    copies: Iterable[StridedCopy],
    into: Tensor,
    blocks: BlockVerifier | None = None,
) -> None:
    """Copy elements of the run that starts at byte ``offset`` of a file into a flat host tensor.

    Contiguous elements are read directly into place.  Strided ones go through a window of the file:
    with ``blocks`` it is read and verified; without, it is memory-mapped, so that only the pages
    with wanted elements are touched.  Raises CheckpointError if the file is short, unreadable or
    changed.
    """
    item, bytes_into = into.itemsize, as_bytes(into)
    with open_to_read(path) as fd:
        for copy in copies:
            start, width = offset + copy.source * item, copy.columns * item
            target = bytes_into[copy.target * item :]
            if copy.rows > 1:
                _read_strided(fd, path, start, copy, item, target, blocks)
            elif blocks is None:
                read_exactly(fd, path, start, target[:width])
            else:
                blocks.read(fd, start, target[:width])


def _read_strided(
    fd: int,
    path: Path,
    offset: int,
    copy: StridedCopy,
    item: int,
    into: Bytes,
    blocks: BlockVerifier | None,
) -> None:
    step, width = copy.source_stride * item, copy.columns * item
    target_step = copy.target_stride * item
    at_once = max(1, WINDOW_BYTES // step)
    for row in range(0, copy.rows, at_once):
        rows, start = min(at_once, copy.rows - row), offset + row * step
        length = (rows - 1) * step + width
        target = np.ndarray(
            (rows, width), np.uint8, into[row * target_step :].data, 0, (target_step, 1)
        )
        if blocks is None:
            check_length(fd, path, start + length)
            skip = start % mmap.ALLOCATIONGRANULARITY
            with map_file(fd, path, skip + length, start - skip) as window:
                target[:] = np.ndarray((rows, width), np.uint8, window, skip, (step, 1))
        else:
            buffer = np.empty(length, np.uint8)
            blocks.read(fd, start, buffer)
            target[:] = np.ndarray((rows, width), np.uint8, buffer.data, 0, (step, 1))


def write_safetensors(
    path: Path, tensors: Sequence[TensorStream], progress: Progress = no_progress
) -> WrittenFile:
    """Write a safetensors file chunk by chunk, hash it meanwhile, and sync it to disk.

    A second thread syncs what is written in the meantime, every ``SYNC_BYTES``.  Calls ``progress``
    with the bytes of each chunk.  Raises NoRoom if the disk is full or a quota or file size limit
    is reached, CheckpointError if the disk refuses otherwise.
    """
    header, offsets, size = build_header([(t.name, t.dtype, t.shape) for t in tensors])
    blocks = BlockHasher()
    blocks.update(memoryview(header))
    blocks.end_block()
    synced, syncing = 0, None
    with (
        explain_write_errors(path, size),
        open(path, "wb", 0, opener=new_file) as file,
        ThreadPoolExecutor(1, "llamax-sync") as syncer,
    ):
        _write_at(file.fileno(), memoryview(header), 0)
        for tensor in sorted(tensors, key=lambda tensor: offsets[tensor.name]):
            at = offsets[tensor.name]
            for chunk in tensor.chunks:
                view = as_bytes(chunk).data
                for start in range(0, len(view), WRITE_BYTES):
                    piece = view[start : start + WRITE_BYTES]
                    _write_at(file.fileno(), piece, at)
                    blocks.update(piece)  # it is in the processor's cache now
                    at += len(piece)
                    if at - synced > SYNC_BYTES and (syncing is None or syncing.done()):
                        if syncing is not None:
                            syncing.result()
                        synced, syncing = at, syncer.submit(sync_handle, file.fileno(), path)
                progress(len(view))
            blocks.end_block()
        if syncing is not None:
            syncing.result()
        sync_handle(file.fileno(), path)
    return WrittenFile(size, len(header), blocks.digests())


def build_header(
    tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]],
) -> tuple[bytes, dict[str, int], int]:
    """The first bytes of a file for tensors (name, dtype, shape), the byte offset of each, and the
    size of the file.

    Wide dtypes come first, so that every tensor is aligned.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: -tensor[1].itemsize):
        extent = [at, at := at + math.prod(shape) * dtype.itemsize]
        header[name] = {"dtype": TAGS[dtype], "shape": list(shape), "data_offsets": extent}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    del header["__metadata__"]
    offsets = {name: len(start) + entry["data_offsets"][0] for name, entry in header.items()}
    return start, offsets, len(start) + at


def write_tensor_at(path: Path, offset: int, chunks: Iterable[Tensor], size_bytes: int) -> None:
    """Write one tensor of ``size_bytes`` at byte ``offset`` of a file that exists already.

    Raises NoRoom or CheckpointError if the disk refuses.
    """
    with (
        explain_write_errors(path, size_bytes),
        open(path, "r+b", buffering=0, opener=same_file) as file,
    ):
        for chunk in chunks:
            view = as_bytes(chunk).data
            _write_at(file.fileno(), view, offset)
            offset += len(view)


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data[:WRITE_BYTES], offset)
        data, offset = data[done:], offset + done
