"""Reading files of ``torch.save`` without torch.load: a zip of one pickle and raw tensor data.

::

    name/data.pkl      the structure, read by ``torch_pickle``
    name/byteorder     little
    name/data/0        the elements of storage '0', uncompressed: a tensor is a range of the file

Opening a file reads its structure; a tensor's bytes are read, and checked against the checksum of
their storage, when it is loaded.  Only uncompressed
entries are accepted, and together they must fit into the file, so nothing can expand to more bytes
than the file has.  A file that torch reads and llamax does not (an older or compressed format, big
endian) is reported as unsupported, not as damaged.

Source: torch.serialization; the ZIP format (PKWARE's APPNOTE, sections 4.3.7, 4.3.12 to 4.3.16 and
4.5.3).
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from llamax.checkpoint import safetensors_io
from llamax.checkpoint.formats import torch_pickle
from llamax.checkpoint.formats.torch_pickle import InertObject
from llamax.checkpoint.runs import StridedCopy
from llamax.runtime.errors import CheckpointError
from llamax.runtime.files import plain_file

MAX_DIRECTORY_BYTES = 64 << 20
MAX_DEPTH = 6  # of nested dicts: {"model": {"language_model": {"embedding": {...}}}}
CHUNK_BYTES = 16 << 20  # of a storage, checked at a time
MAX16, MAX32 = 0xFFFF, 0xFFFFFFFF
OTHER_FORMATS = {  # by their first bytes
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": "a file in the format of torch before 1.6",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x1f\x8b": "a gzip file",
}


@dataclass
class Checksum:
    """The CRC-32 of the bytes of a storage, which its tensors share; ``crc`` 0: nothing to check.

    torch computes none with ``compute_crc32 = False``; afterwards it is checked.
    """

    size_bytes: int
    crc: int

    def check(self, path: Path, offset: int, read: Tensor) -> None:
        """Check a storage once; ``read``: elements of it that are in memory, if all of them.

        Raises CheckpointError if its bytes are other ones than were saved.
        """
        if not self.crc:
            return
        found = 0
        if read.nbytes == self.size_bytes:
            found = zlib.crc32(read.view(torch.uint8).numpy().data)
        else:  # a tensor that is part of its storage
            with open(path, "rb", opener=plain_file) as file:
                file.seek(offset)
                for left in range(self.size_bytes, 0, -CHUNK_BYTES):
                    found = zlib.crc32(file.read(min(left, CHUNK_BYTES)), found)
        if found != self.crc:
            raise CheckpointError(
                f"{path}: bytes {offset} to {offset + self.size_bytes} do not match their "
                "checksum; copy it again"
            )
        self.crc = 0


class StoredTensor(NamedTuple):
    """A tensor in a file, not yet loaded.

    ``offset`` is the byte at which its storage begins; ``start`` and ``strides`` count elements.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    checksum: Checksum = Checksum(0, 0)

    def load(self) -> Tensor:
        """Read the tensor into new contiguous memory.

        Raises CheckpointError if the file is short or its checksum differs.
        """
        if not math.prod(self.shape):
            return torch.empty(self.shape, dtype=self.dtype)
        extent = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        flat = torch.empty(extent, dtype=self.dtype)
        at = self.offset + self.start * self.dtype.itemsize
        safetensors_io.read_elements(
            self.path, at, [StridedCopy(1, extent, 0, extent, 0, extent)], flat
        )
        self.checksum.check(self.path, self.offset, flat)
        return flat.as_strided(self.shape, self.strides).contiguous()


class ZipEntry(NamedTuple):
    """A file inside the zip: the byte offset of its local header, its size and its CRC-32."""

    header: int
    size_bytes: int
    crc: int


class BrokenZip(Exception):
    """The damage because of which an archive cannot be read."""


class UnsupportedFile(Exception):
    """The format of a file that is not damaged, but that llamax does not read."""


def load(path: Path) -> Any:
    """The contents of a file: dicts, lists and tuples of numbers, text, None and ``StoredTensor``.

    Objects of other classes are ``InertObject``.  Raises CheckpointError if the file is damaged, of
    a format that llamax does not read, or names functions that run code.
    """
    try:
        with open(path, "rb", opener=plain_file) as file:
            return _load(path, file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except UnsupportedFile as error:
        raise CheckpointError(
            f"{path} is {error}, which llamax does not read; load it with torch and torch.save its "
            "state dict again"
        ) from None
    except BrokenZip as error:
        why = str(error)
    except (struct.error, ValueError, OverflowError):
        why = "its archive is inconsistent"
    raise CheckpointError(f"{path} is not a complete file of torch.save: {why}; copy it again")


def _load(path: Path, file: BinaryIO, size: int) -> Any:
    file.seek(0)
    for start, kind in OTHER_FORMATS.items():
        if file.read(len(start)) == start:
            raise UnsupportedFile(kind)
        file.seek(0)
    entries = _entries(file, size)
    structures = [n for n in entries if n.count("/") == 1 and n.endswith("/data.pkl")]
    if len(structures) != 1:
        raise BrokenZip(f"it has {len(structures)} entries data.pkl")
    prefix = structures[0].removesuffix("data.pkl")
    order = entries.get(f"{prefix}byteorder")
    if order and _read(file, size, order) != b"little":
        raise UnsupportedFile("a file of a big-endian machine")
    structure = torch_pickle.read_pickle(_read(file, size, entries[structures[0]]), str(path))
    places: dict[str, tuple[int, Checksum]] = {}

    def locate(tensor: torch_pickle.PickledTensor) -> StoredTensor:
        storage = tensor.storage
        entry = entries.get(f"{prefix}data/{storage.key}")
        if entry is None or entry.size_bytes < storage.length * storage.dtype.itemsize:
            raise BrokenZip(f"storage {storage.key[:40]!r} is missing or short")
        if storage.key not in places:
            checksum = Checksum(entry.size_bytes, entry.crc)
            places[storage.key] = _start(file, size, entry), checksum
        offset, checksum = places[storage.key]
        return StoredTensor(
            path, offset, storage.dtype, tensor.start, tensor.shape, tensor.strides, checksum
        )

    return replace_values(structure, torch_pickle.PickledTensor, locate)


def replace_values(value: Any, kind: type, by: Callable[[Any], Any]) -> Any:
    """``value`` with every value of type ``kind`` replaced, in nested dicts down to ``MAX_DEPTH``.

    Deeper dicts become None.  A dict that occurs several times is copied once per level, so that a
    small file of shared dicts cannot expand without limit.
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

    return walk(value, MAX_DEPTH)


def as_dict(value: Any, path: Path) -> Mapping[Any, Any]:
    """``value``, which must be a dict; CheckpointError otherwise."""
    if not isinstance(value, dict):
        kind = value.name if isinstance(value, InertObject) else f"a {type(value).__name__}"
        raise CheckpointError(f"{path} holds {kind}, not a dict of tensors; save a state_dict")
    return value


# --- the zip -------------------------------------------------------------------------------------


def _entries(file: BinaryIO, size: int) -> dict[str, ZipEntry]:
    """The directory of a zip, by name; all entries are uncompressed and fit into the file."""
    count, length, offset = _directory(file, size)
    if length > MAX_DIRECTORY_BYTES or offset + length > size:
        raise BrokenZip(f"its directory claims {length} bytes")
    file.seek(offset)
    data, at = file.read(length), 0
    found: dict[str, ZipEntry] = {}
    kind = ""
    for _ in range(count):
        magic, _, _, flags, method, _, _, crc, packed, plain, *lengths, _, _, _, header = (
            struct.unpack_from("<4s6H3I5H2I", data, at)
        )
        name_bytes, extra_bytes, comment_bytes = lengths
        name = data[at + 46 : at + 46 + name_bytes].decode("utf-8")
        extra = data[at + 46 + name_bytes : at + 46 + name_bytes + extra_bytes]
        plain, packed, header = _wide(extra, [plain, packed, header])
        if magic != b"PK\1\2" or name in found:
            raise BrokenZip(f"its directory is damaged at {name[:40]!r}")
        if method or flags & 1:
            kind = "an encrypted archive" if flags & 1 else "a compressed archive"
        elif plain != packed:
            raise BrokenZip(f"its directory is damaged at {name[:40]!r}")
        found[name] = ZipEntry(header, plain, crc)
        at += 46 + name_bytes + extra_bytes + comment_bytes
    if any(name.endswith("/constants.pkl") for name in found):
        kind = "a TorchScript program"
    if kind:
        raise UnsupportedFile(kind)
    if sum(entry.size_bytes for entry in found.values()) > size:
        raise BrokenZip("its entries overlap")
    return found


def _directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """The number of entries in the directory, its size in bytes and its offset."""
    file.seek(max(0, size - 22 - MAX16))
    tail = file.read()
    at = len(tail) - 22 if tail[-22:].startswith(b"PK\5\6") else tail.rfind(b"PK\5\6")
    if at < 0:
        raise BrokenZip("it is not a zip archive")
    count, length, offset = struct.unpack_from("<HII", tail, at + 10)
    if count == MAX16 or MAX32 in (length, offset):
        magic, _, where = struct.unpack_from("<4sIQ", tail, at - 20) if at >= 20 else (b"", 0, 0)
        file.seek(min(where, size))
        record = file.read(56)
        if magic != b"PK\6\7" or not record.startswith(b"PK\6\6"):
            raise BrokenZip("the end of its directory is missing")
        count, length, offset = struct.unpack_from("<QQQ", record, 32)
    return int(count), int(length), int(offset)


def _wide(extra: bytes, numbers: list[int]) -> list[int]:
    """The numbers of an entry; those that do not fit 32 bits come from its zip64 extra field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            return [next(wide, number) if number == MAX32 else number for number in numbers]
        at += 4 + length
    return numbers


def _start(file: BinaryIO, size: int, entry: ZipEntry) -> int:
    """The offset of an entry's data, which follows its local header."""
    file.seek(min(entry.header, size))
    magic, name_bytes, extra_bytes = struct.unpack("<4s22xHH", file.read(30))
    start = int(entry.header + 30 + name_bytes + extra_bytes)
    if magic != b"PK\3\4" or start + entry.size_bytes > size:
        raise BrokenZip("an entry lies outside the file")
    return start


def _read(file: BinaryIO, size: int, entry: ZipEntry) -> bytes:
    """The bytes of an entry; a CRC of 0 was not computed (``compute_crc32 = False`` in torch)."""
    if entry.size_bytes > torch_pickle.MAX_BYTES:
        raise UnsupportedFile(f"a file with {entry.size_bytes} bytes of structure")
    file.seek(_start(file, size, entry))
    data = file.read(entry.size_bytes)
    if entry.crc and zlib.crc32(data) != entry.crc:
        raise BrokenZip("its structure is damaged")
    return data
