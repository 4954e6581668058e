"""The long part of a manifest: one binary file with all runs and all block checksums.

::

    index.bin    runs        [N, 5] int64     file, left, width, start, length
                 checksums   [M, 8] bytes     XXH3 of every block, file after file

Runs are in the order of ``manifest.json``'s tensors and kinds, those of a kind by strip and start,
so that checking that they tile a tensor is one pass.  The file is mapped, not parsed: a rank of
thousands touches the runs of its own share, and the ranks of a node share the pages.  Numbers are
little-endian.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llamax.checkpoint.checksums import CHECKSUM_BYTES, open_to_read
from llamax.checkpoint.runs import Run
from llamax.runtime.errors import CheckpointError
from llamax.runtime.files import sha256_from
from llamax.runtime.mapping import map_file

INDEX = "index.bin"
COLUMNS = 5  # file, left, width, start, length
RUN = np.dtype("<i8")
RUN_BYTES = COLUMNS * RUN.itemsize

Runs = npt.NDArray[np.int64]
NO_RUNS: Runs = np.zeros((0, COLUMNS), np.int64)


class KindRecord:
    """One kind of a tensor (weight, master, exp_avg or exp_avg_sq): its dtype and its runs."""

    def __init__(self, dtype: str, runs: Runs = NO_RUNS) -> None:
        self.dtype = dtype
        self._runs = runs
        self._added: list[tuple[int, ...]] = []

    def add(self, file: int, run: Run) -> None:
        """Note that the file of this number holds a run."""
        self._added.append((file, *run))

    @property
    def runs(self) -> Runs:
        """[n, 5]: the number of the file, then left, width, start and length of the run."""
        if self._added:
            rows = np.array([*self._runs.tolist(), *self._added], np.int64)
            _, left, width, start, _ = rows.T
            self._runs, self._added = rows[np.lexsort((start, width, left))], []
        return self._runs


def tiles(shape: Sequence[int], runs: Runs) -> bool:
    """Whether ``runs``, by strip and start, cover every element of a tensor exactly once."""
    elements, columns = 1, 1
    for dim in shape:
        elements *= dim
    for dim in shape[1:]:
        columns *= dim
    numbers = runs[:, 1:]
    if not len(runs) or elements >= 2**62 or not ((numbers >= 0) & (numbers <= elements)).all():
        return False
    left, width, start, length = numbers.T
    stop = start + length
    begins = np.ones(len(runs), bool)  # the first run of a strip
    begins[1:] = (left[1:] != left[:-1]) | (width[1:] != width[:-1])
    ends = np.append(begins[1:], True)
    previous = np.append(0, stop[:-1])
    first, across = left[begins], width[begins]
    return bool(
        (length > 0).all()
        and (width > 0).all()
        and (start == np.where(begins, 0, previous)).all()
        and (stop[ends] == elements // columns * across).all()
        and first[0] == 0
        and (first[1:] == first[:-1] + across[:-1]).all()
        and first[-1] + across[-1] == columns
    )


def near(runs: Runs, run: Run) -> Runs:
    """Those of the runs that may have elements in common with ``run``."""
    _, left, width, start, length = runs.T
    stop, right = start + length, run.left + run.width
    same = (left == run.left) & (width == run.width)
    within = (start < run.stop) & (stop > run.start)
    rows = (start // width * run.width < run.stop) & (-(-stop // width) > run.start // run.width)
    chosen: Runs = runs[np.where(same, within, rows & (left < right) & (left + width > run.left))]
    return chosen


def pack(runs: Sequence[Runs], sums: Sequence[bytes]) -> bytes:
    """The content of an index."""
    return b"".join([*(each.astype(RUN).tobytes() for each in runs), *sums])


def changed(path: Path, sha256: str, says: str) -> CheckpointError:
    """The error for a file that has another sha256 than something ``says``."""
    return CheckpointError(f"{path} changed after it was saved: its sha256 is {sha256}, {says}")


class Index:
    """The index of a checkpoint whose manifest counts ``runs`` runs and ``blocks`` blocks.

    Raises CheckpointError if the file is missing, of another size, or not the one that was saved.
    """

    def __init__(self, path: Path, expected_sha256: str, runs: int, blocks: int) -> None:
        size = runs * RUN_BYTES + blocks * CHECKSUM_BYTES
        with open_to_read(path) as fd:
            if (actual := os.fstat(fd).st_size) != size:
                raise CheckpointError(
                    f"{path} is broken: it has {actual} bytes, and the manifest counts {runs} "
                    f"runs and {blocks} blocks, which take {size}"
                )
            with open(fd, "rb", buffering=0, closefd=False) as file:
                actual_sha256 = sha256_from(file)
            if actual_sha256 != expected_sha256:
                raise changed(path, actual_sha256, f"the manifest says {expected_sha256:.64}")
            data: Any = map_file(fd, path) if size else b""
        self._runs = np.frombuffer(data, RUN, runs * COLUMNS).reshape(runs, COLUMNS)
        self._sums = memoryview(data)[runs * RUN_BYTES :]

    def runs(self, start: int, count: int) -> Runs:
        """Runs [start, start + count)."""
        return self._runs[start : start + count]

    def sums(self, start: int, count: int) -> memoryview:
        """The checksums of blocks [start, start + count)."""
        return self._sums[start * CHECKSUM_BYTES : (start + count) * CHECKSUM_BYTES]
