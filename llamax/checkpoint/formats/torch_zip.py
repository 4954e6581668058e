"""What ``torch.save`` wrote, without torch.load: a zip of one pickle and the bytes of its tensors.

::

    name/data.pkl      the structure, read by ``pickles``
    name/byteorder     little
    name/data/0        the elements of storage '0', stored plain, so a tensor is a place in the file

Opening a file costs its structure; a tensor's bytes are read when it is asked for.  Only entries
that are stored plain are known, and together they must fit the file: nothing can unpack to more
than is there.

Source: torch.serialization; the ZIP format (PKWARE's APPNOTE, sections 4.3.7, 4.3.12 to 4.3.16 and
4.5.3).
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from llamax.checkpoint import safetensors_io
from llamax.checkpoint.formats import torch_pickle
from llamax.checkpoint.runs import StridedCopy
from llamax.runtime.errors import CheckpointError

MOST_DIRECTORY_BYTES = 64 << 20
DEEPEST = 6  # dicts in dicts: {"model": {"language_model": {"embedding": {...}}}}
MAX16, MAX32 = 0xFFFF, 0xFFFFFFFF


class Stored(NamedTuple):
    """A tensor in a file: where its storage's first byte lies, and which elements it takes."""

    path: Path
    offset: int
    dtype: torch.dtype
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def load(self) -> Tensor:
        """The tensor, contiguous, in memory of its own."""
        if not math.prod(self.shape):
            return torch.empty(self.shape, dtype=self.dtype)
        extent = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        flat = torch.empty(extent, dtype=self.dtype)
        at = self.offset + self.start * self.dtype.itemsize
        safetensors_io.read_elements(
            self.path, at, [StridedCopy(1, extent, 0, extent, 0, extent)], flat
        )
        return flat.as_strided(self.shape, self.strides).contiguous()


class ZipEntry(NamedTuple):
    """A file inside the zip: where its own header lies, its size and checksum."""

    header: int
    size_bytes: int
    crc: int


class Broken(Exception):
    """What is wrong with an archive."""


def load(path: Path) -> Any:
    """What a file holds: numbers, text, None, ``Stored``, and dicts, lists and tuples of them.

    Raises CheckpointError where it is no file of torch.save, damaged, or asks for more than
    tensors and plain containers.
    """
    try:
        with open(path, "rb") as file:
            return _load(path, file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except Broken as error:
        why = str(error)
    except (struct.error, ValueError, OverflowError):
        why = "its archive contradicts itself"
    raise CheckpointError(f"{path} is no whole file of torch.save: {why}; copy it anew")


def _load(path: Path, file: BinaryIO, size: int) -> Any:
    entries = _entries(file, size)
    structures = [n for n in entries if n.count("/") == 1 and n.endswith("/data.pkl")]
    if len(structures) != 1:
        raise Broken(f"it has {len(structures)} entries data.pkl")
    home = structures[0].removesuffix("data.pkl")
    order = entries.get(f"{home}byteorder")
    if order and _read(file, size, order, 6) != b"little":
        raise Broken("its byte order is not little")
    found = torch_pickle.read(
        _read(file, size, entries[structures[0]], torch_pickle.MOST_BYTES), str(path)
    )
    offsets: dict[str, int] = {}

    def place(tensor: torch_pickle.Tensor) -> Stored:
        storage = tensor.storage
        entry = entries.get(f"{home}data/{storage.key}")
        if entry is None or entry.size_bytes < storage.length * storage.dtype.itemsize:
            raise Broken(f"storage {storage.key[:40]!r} is missing or short")
        if storage.key not in offsets:
            offsets[storage.key] = _start(file, size, entry)
        return Stored(
            path, offsets[storage.key], storage.dtype, tensor.start, tensor.shape, tensor.strides
        )

    return replaced(found, torch_pickle.Tensor, place)


def replaced(held: Any, kind: type, by: Callable[[Any], Any]) -> Any:
    """``held`` with values of type ``kind`` replaced, in dicts of dicts down to ``DEEPEST``.

    What lies deeper becomes None; a dict that is in several places is copied once a level, so that
    structures made to explode do not.
    """
    done: dict[tuple[int, int], Any] = {}

    def walk(value: Any, depth: int) -> Any:
        if isinstance(value, kind):
            return by(value)
        if type(value) is not dict:
            return value
        if depth == 0:
            return None
        if (id(value), depth) not in done:
            copy = {key: walk(inner, depth - 1) for key, inner in value.items()}
            done[id(value), depth] = copy
        return done[id(value), depth]

    return walk(held, DEEPEST)


def mapping(held: Any, path: Path) -> Mapping[Any, Any]:
    """``held`` as a dict; CheckpointError where it is none."""
    if not isinstance(held, dict):
        raise CheckpointError(f"{path} holds a {type(held).__name__}, not a dict of tensors")
    return held


# --- the zip -------------------------------------------------------------------------------------


def _entries(file: BinaryIO, size: int) -> dict[str, ZipEntry]:
    """The directory of a zip: plainly stored files only, that fit into it together."""
    count, length, offset = _directory(file, size)
    if length > MOST_DIRECTORY_BYTES or offset + length > size:
        raise Broken(f"its directory claims {length} bytes")
    file.seek(offset)
    data, at = file.read(length), 0
    found: dict[str, ZipEntry] = {}
    for _ in range(count):
        magic, _, _, flags, method, _, _, crc, packed, plain, *lengths, _, _, _, header = (
            struct.unpack_from("<4s6H3I5H2I", data, at)
        )
        name_bytes, extra_bytes, comment_bytes = lengths
        name = data[at + 46 : at + 46 + name_bytes].decode("utf-8")
        extra = data[at + 46 + name_bytes : at + 46 + name_bytes + extra_bytes]
        plain, packed, header = _wide(extra, [plain, packed, header])
        if magic != b"PK\1\2" or name in found:
            raise Broken(f"its directory is damaged at {name[:40]!r}")
        if method or flags & 1 or plain != packed:
            raise Broken(f"{name[:40]!r} is compressed")
        found[name] = ZipEntry(header, plain, crc)
        at += 46 + name_bytes + extra_bytes + comment_bytes
    if sum(entry.size_bytes for entry in found.values()) > size:
        raise Broken("its entries overlap")
    return found


def _directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """How many entries the directory has, its bytes, and where it begins."""
    file.seek(max(0, size - 22 - MAX16))
    tail = file.read()
    at = len(tail) - 22 if tail[-22:].startswith(b"PK\5\6") else tail.rfind(b"PK\5\6")
    if at < 0:
        raise Broken("it is no zip archive (torch before 1.6 wrote others: load and save it there)")
    count, length, offset = struct.unpack_from("<HII", tail, at + 10)
    if count == MAX16 or MAX32 in (length, offset):
        magic, _, where = struct.unpack_from("<4sIQ", tail, at - 20) if at >= 20 else (b"", 0, 0)
        file.seek(min(where, size))
        record = file.read(56)
        if magic != b"PK\6\7" or not record.startswith(b"PK\6\6"):
            raise Broken("the end of its directory is missing")
        count, length, offset = struct.unpack_from("<QQQ", record, 32)
    return int(count), int(length), int(offset)


def _wide(extra: bytes, numbers: list[int]) -> list[int]:
    """Numbers of an entry, from its extra field where they do not fit 32 bits."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            return [next(wide, number) if number == MAX32 else number for number in numbers]
        at += 4 + length
    return numbers


def _start(file: BinaryIO, size: int, entry: ZipEntry) -> int:
    """Where an entry's bytes begin, after its own header."""
    file.seek(min(entry.header, size))
    magic, name_bytes, extra_bytes = struct.unpack("<4s22xHH", file.read(30))
    start = int(entry.header + 30 + name_bytes + extra_bytes)
    if magic != b"PK\3\4" or start + entry.size_bytes > size:
        raise Broken("an entry lies outside the file")
    return start


def _read(file: BinaryIO, size: int, entry: ZipEntry, most_bytes: int) -> bytes:
    if entry.size_bytes > most_bytes:
        raise Broken(f"its structure has {entry.size_bytes} bytes")
    file.seek(_start(file, size, entry))
    data = file.read(entry.size_bytes)
    if zlib.crc32(data) != entry.crc:
        raise Broken("its structure is damaged")
    return data
