"""The safetensors container, read and written by hand: a length, a JSON header, raw bytes.

::

    [8 bytes: n][n bytes: {"name": {"dtype", "shape", "data_offsets": [from, to]}, ...}][data]

Writing by hand lets a file stream through a small buffer and be hashed on its way; reading by hand
lets any run of any tensor be fetched without touching the rest, and checks a header before a byte
is allocated for what it promises.  Format: https://github.com/huggingface/safetensors (Format).
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llamax.checkpoint.checksums import Blocks, Bytes, Sums, opened, read_exactly
from llamax.checkpoint.lock import LOCK, held
from llamax.checkpoint.runs import Copy
from llamax.runtime.errors import CheckpointError, NoRoom, Terminated
from llamax.runtime.files import NO_ROOM, write_atomic

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
TAGS = {dtype: tag for tag, dtype in DTYPES.items()}
SLAB_BYTES = 16 << 20
WINDOW_BYTES = 4 << 20
WRITE_BYTES = 1 << 20  # ext4 takes 16 MiB at once up to ten times slower
MOST_HEADER_BYTES = 16 << 20  # of 405B parameters it takes one
MOST_DIMS = 16


Progress = Callable[[int], object]


def silent(size_bytes: int) -> None:
    """Progress that nobody watches."""


class Entry(NamedTuple):
    """One tensor of a file; ``offset`` counts bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class Outgoing(NamedTuple):
    """One tensor on its way into a file: its bytes come in chunks, when they are asked for."""

    name: str
    dtype: torch.dtype
    shape: Sequence[int]
    chunks: Iterable[Tensor]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Written(NamedTuple):
    """A file as it was written."""

    size_bytes: int
    sha256: str
    sums: str  # of its blocks


def raw(tensor: Tensor) -> Bytes:
    """The bytes of a contiguous host tensor, sharing its memory."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, checked against its size.

    Raises CheckpointError where the file is missing, cut short, or its header contradicts itself.
    """

    def broken(why: str) -> CheckpointError:
        return CheckpointError(f"{path} is not a whole safetensors file: {why}; copy it anew")

    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
                raise broken(f"its header claims {length} of {size} bytes")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise broken("its header is not JSON") from None
    if not isinstance(header, dict):
        raise broken("its header is not a JSON object")
    header.pop("__metadata__", None)
    found, extents = {}, []
    for name, about in header.items():
        name_told = name if name.isprintable() and len(name) < 100 else f"{name!r:.80}"
        try:
            tag, shape, (start, stop) = about["dtype"], about["shape"], about["data_offsets"]
            numbers = [*shape, start, stop]
        except (TypeError, KeyError, ValueError):
            raise broken(f"the entry of {name_told} is malformed") from None
        if not isinstance(tag, str) or tag not in DTYPES:
            told = tag if isinstance(tag, str) and tag.isidentifier() else f"{tag!r:.40}"
            raise broken(f"{name_told} has dtype {told:.40}, none of {', '.join(DTYPES)}")
        if len(shape) > MOST_DIMS or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise broken(f"{name_told} has shape {shape!s:.80} at {[start, stop]!s:.80}")
        if stop - start != math.prod(shape) * DTYPES[tag].itemsize:
            raise broken(f"{name_told} {tag}{shape!s:.80} does not fit its {stop - start} bytes")
        found[name] = Entry(DTYPES[tag], tuple(shape), 8 + length + start)
        extents.append((start, stop))
    at = 0
    for start, stop in sorted(extents):
        if start != at:
            raise broken(f"its tensors leave a hole or overlap at byte {at}")
        at = stop
    if at != size - 8 - length:
        raise broken(f"its tensors end at byte {8 + length + at}, the file has {size}")
    return found


def read(
    path: Path, offset: int, copies: Iterable[Copy], into: Tensor, blocks: Blocks | None = None
) -> None:
    """Copy elements of the run that starts at byte ``offset`` of a file into a flat host tensor.

    Contiguous elements are read straight into place, strided ones through a window of the file:
    one that is read and checked with ``blocks``, else one that is mapped for the moment, so that
    only the pages they lie in are touched.
    """
    item, bytes_into = into.itemsize, raw(into)
    with opened(path) as fd:
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
    fd: int, path: Path, offset: int, copy: Copy, item: int, into: Bytes, blocks: Blocks | None
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
            skip = start % mmap.ALLOCATIONGRANULARITY
            with mmap.mmap(
                fd, skip + length, access=mmap.ACCESS_READ, offset=start - skip
            ) as window:
                target[:] = np.ndarray((rows, width), np.uint8, window, skip, (step, 1))
        else:
            held = np.empty(length, np.uint8)
            blocks.read(fd, start, held)
            target[:] = np.ndarray((rows, width), np.uint8, held.data, 0, (step, 1))


def write(
    path: Path,
    tensors: Sequence[Outgoing],
    progress: Progress = silent,
) -> Written:
    """Write a safetensors file, chunk by chunk, hashed on its way and durable.

    ``progress`` takes bytes.
    Raises NoRoom where the disk is full, or a quota or limit reached.
    """
    start, places, size = head([(t.name, t.dtype, t.shape) for t in tensors])
    digest, sums = hashlib.sha256(start), Sums()
    sums.update(memoryview(start))
    sums.cut()
    with writing(path, size), open(path, "wb", buffering=0) as file:
        _write_at(file.fileno(), memoryview(start), 0)
        for tensor in sorted(tensors, key=lambda tensor: places[tensor.name]):
            at = places[tensor.name]
            for chunk in tensor.chunks:
                view = raw(chunk).data
                digest.update(view)
                sums.update(view)
                _write_at(file.fileno(), view, at)
                at += len(view)
                progress(len(view))
            sums.cut()
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest(), sums.text())


def head(
    tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]],
) -> tuple[bytes, dict[str, int], int]:
    """The start of a file for tensors (name, dtype, shape), where each one's bytes go, its size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in sorted(tensors, key=lambda one: -one[1].itemsize):  # all aligned
        extent = [at, at := at + math.prod(shape) * dtype.itemsize]
        header[name] = {"dtype": TAGS[dtype], "shape": list(shape), "data_offsets": extent}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    del header["__metadata__"]
    places = {name: len(start) + about["data_offsets"][0] for name, about in header.items()}
    return start, places, len(start) + at


def put(path: Path, offset: int, chunks: Iterable[Tensor], size_bytes: int) -> None:
    """Write the ``size_bytes`` of one tensor to its place in a file that is laid out."""
    with writing(path, size_bytes), open(path, "r+b", buffering=0) as file:
        for chunk in chunks:
            view = raw(chunk).data
            _write_at(file.fileno(), view, offset)
            offset += len(view)


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data[:WRITE_BYTES], offset)
        data, offset = data[done:], offset + done


def write_note(path: Path, text: str) -> None:
    """Show other ranks a small file, at once; what it makes them do may move its folder away."""
    with writing(path, len(text)):
        beside = path.with_name(path.name + ".part")
        beside.write_text(text)
        os.replace(beside, path)


def write_text(path: Path, text: str) -> None:
    """Replace a small file at once, durably: it has the old text or the new, never a part."""
    data = text.encode()
    with writing(path, len(data)):
        write_atomic(path, data)


@contextmanager
def writing(path: Path, needed_bytes: int) -> Iterator[None]:
    """Turn what the disk refuses into one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise CheckpointError(f"cannot write {path}: {error.strerror}") from None
        free = shutil.disk_usage(path.parent).free
        raise NoRoom(
            f"no room for {path} ({error.strerror}): {needed_bytes} bytes needed, {free} free; "
            "make room or write elsewhere"
        ) from None


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """A folder to fill that takes the name ``out`` when all went well, and vanishes otherwise.

    It is this process' alone.  SIGTERM ends the filling with Terminated.
    """
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out} exists already; remove it or choose another `out`")
    out = out.resolve()  # a link to an empty folder stays one
    part = out.with_name(out.name + ".part")
    with held(part, patience_s=0), _terminable(out):
        try:
            with writing(part, 0):
                for leftover in part.iterdir():
                    if leftover.is_dir():
                        shutil.rmtree(leftover)
                    elif leftover.name != LOCK:
                        leftover.unlink()
            yield part
            with writing(out, 0):
                (part / LOCK).unlink()
                os.rename(part, out)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


@contextmanager
def _terminable(out: Path) -> Iterator[None]:
    """Let SIGTERM raise Terminated, where nobody else listens to it."""

    def leave(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what follows takes a moment
        raise Terminated(f"stopped by SIGTERM: {out} was not written")

    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
