"""Verifying the files of a checkpoint against the block checksums of its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from llamax.checkpoint.checksums import BLOCK_BYTES, CHECKSUM_BYTES, BlockVerifier, open_to_read
from llamax.checkpoint.manifest import FileRecord
from llamax.checkpoint.safetensors_io import Progress, TensorEntry, no_progress, read_header


def verify_files(
    folder: Path, records: Sequence[FileRecord], progress: Progress = no_progress
) -> None:
    """Read whole files on two threads and compare all their blocks with the manifest.

    Calls ``progress`` with the bytes of each file.  Raises CheckpointError that names the first
    file that differs.
    """
    with ThreadPoolExecutor(max_workers=2) as pool:
        verified = pool.map(lambda record: _verify_file(folder / record.name, record), records)
        try:
            for record, _ in zip(records, verified, strict=True):
                progress(record.size_bytes)
        finally:  # after a failure the remaining files are not read
            pool.shutdown(wait=False, cancel_futures=True)


def _verify_file(path: Path, record: FileRecord) -> None:
    _, blocks = read_checked(path, record)
    with open_to_read(path) as fd:
        blocks.check(fd)


def read_checked(path: Path, record: FileRecord) -> tuple[dict[str, TensorEntry], BlockVerifier]:
    """The tensors of a file by name, and the verifier of its blocks.

    Raises CheckpointError if its header is not the one that was saved.
    """
    check_header(path, record)
    header = read_header(path)
    ends = [*sorted({entry.offset for entry in header.values()}), record.size_bytes]
    return header, BlockVerifier(path, ends, record.sums)


def check_header(path: Path, record: FileRecord) -> None:
    """Raise CheckpointError, with both checksums, if the header of a file has changed."""
    size = record.header_bytes
    sums = record.sums[: -(-size // BLOCK_BYTES) * CHECKSUM_BYTES]
    with open_to_read(path) as fd:
        BlockVerifier(path, [size], sums).read(fd, 0, np.empty(size, np.uint8))
