"""Checksums of the blocks of a file: who reads a part of it checks that part, while reading.

The header of a safetensors file is a block, and each tensor is cut into blocks of 1 MiB.  What is
wanted is read block by block, each hashed while it lies in a cache of the processor; of a block
that is wanted in part all is read, which no rank of the mesh that saved ever needs::

    file      [ header ][ a: block 0 ][ block 1 ][ rest ][ b: block 0 ]...
    wanted                     <------------------->
                           aside      in place    in place

XXH3 finds accidents, at ten times the speed of sha256, which manifests keep for files as a whole.
Source: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64, xxh3_64_hexdigest

from llamax.runtime.errors import CheckpointError

BLOCK_BYTES = 1 << 20
DIGITS = 16  # of one checksum, hexadecimal

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Sums:
    """The checksums of a file whose bytes come by in order."""

    def __init__(self) -> None:
        self._done: list[str] = []
        self._block, self._size = xxh3_64(), 0

    def update(self, data: memoryview) -> None:
        """Take the next bytes of the header or a tensor."""
        while data:
            taken = data[: BLOCK_BYTES - self._size]
            self._block.update(taken)
            self._size += len(taken)
            data = data[len(taken) :]
            if self._size == BLOCK_BYTES:
                self.cut()

    def cut(self) -> None:
        """A tensor ends here: a block does too."""
        if self._size:
            self._done.append(self._block.hexdigest())
            self._block, self._size = xxh3_64(), 0

    def text(self) -> str:
        """All of them, one after another."""
        return "".join(self._done)


class Blocks:
    """A file, where its header and tensors end (from first to last), and its checksums.

    Raises CheckpointError where these are of another file.
    """

    def __init__(self, path: Path, ends: Iterable[int], sums: str) -> None:
        self.path, self.sums = path, sums
        self._starts = [0]
        for end in ends:
            self._starts += range(self._starts[-1] + BLOCK_BYTES, end, BLOCK_BYTES)
            if end > self._starts[-1]:
                self._starts.append(end)
        if len(sums) != DIGITS * (len(self._starts) - 1):
            raise CheckpointError(
                f"{path}: the manifest has {len(sums) // DIGITS} checksums for its "
                f"{len(self._starts) - 1} blocks"
            )

    def read(self, fd: int, start: int, into: Bytes) -> None:
        """Fill ``into`` with the bytes of the file from ``start`` on.

        Raises CheckpointError where a block that they lie in is not what was saved.
        """
        number, done = bisect_right(self._starts, start) - 1, 0
        while done < len(into):
            first, end = self._starts[number : number + 2]
            skipped = start + done - first
            taken = into[done : done + end - first - skipped]
            if len(taken) == end - first:
                self._check(fd, number, taken)
            else:
                block = np.empty(end - first, np.uint8)
                self._check(fd, number, block)
                taken[:] = block[skipped:][: len(taken)]
            number, done = number + 1, done + len(taken)

    def _check(self, fd: int, number: int, into: Bytes) -> None:
        """Read a whole block and compare it with what was saved."""
        start, at = self._starts[number], number * DIGITS
        read_exactly(fd, self.path, start, into)
        found, expected = xxh3_64_hexdigest(into.data), self.sums[at : at + DIGITS]
        if found != expected:
            raise CheckpointError(
                f"{self.path} changed after it was saved: the checksum of its bytes {start} to "
                f"{start + len(into) - 1} is {found}, the manifest says {expected}"
            )


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file to read from; CheckpointError where it cannot be, also later."""
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            yield fd
        finally:
            os.close(fd)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def read_exactly(fd: int, path: Path, offset: int, into: Bytes) -> None:
    """Fill ``into`` with the bytes from ``offset`` on; CheckpointError where the file ends."""
    done = 0
    while done < len(into):
        got = os.preadv(fd, [into[done : done + (1 << 30)].data], offset + done)
        if not got:
            raise CheckpointError(f"{path} ends at byte {offset + done}: cut short; copy it anew")
        done += got
