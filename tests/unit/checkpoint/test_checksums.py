"""Checksums of blocks: whatever part of a file is read, it is right or refused."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from xxhash import xxh3_64_digest

from llamax.checkpoint.checksums import BLOCK_BYTES, BlockHasher, BlockVerifier, open_to_read
from llamax.checkpoint.runs import StridedCopy
from llamax.checkpoint.safetensors_io import read_elements
from llamax.runtime.errors import CheckpointError

# Where a header and five tensors end, one of them empty; and so where blocks do.
ENDS = [100, 100 + BLOCK_BYTES, 150 + BLOCK_BYTES, 150 + BLOCK_BYTES, 4 << 20, (4 << 20) + 9]
SECOND = 150 + BLOCK_BYTES
EDGES = [0, *ENDS[:3], SECOND + BLOCK_BYTES, SECOND + 2 * BLOCK_BYTES, *ENDS[4:]]
DATA = random.Random(1).randbytes(ENDS[-1])
SUMS = b"".join(xxh3_64_digest(DATA[a:b]) for a, b in pairwise(EDGES))


@pytest.mark.parametrize("piece", [1 << 30, BLOCK_BYTES, 99_991])
def test_sums_are_those_of_the_blocks_however_the_bytes_come(piece: int) -> None:
    found = BlockHasher()
    for start, stop in pairwise([0, *ENDS]):
        for at in range(start, stop, piece):
            found.update(memoryview(DATA)[at : min(stop, at + piece)])
        found.end_block()
    assert found.digests() == SUMS


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(DATA)
    return tmp_path / "file"


def part(path: Path, start: int, stop: int) -> bytes:
    into = np.zeros(stop - start, np.uint8)
    with open_to_read(path) as fd:
        BlockVerifier(path, ENDS, SUMS).read(fd, start, into)
    return into.tobytes()


def test_any_part_of_a_file_is_read_as_it_is(path: Path) -> None:
    chance = random.Random(2)
    near = sorted({min(max(0, edge + by), ENDS[-1]) for edge in EDGES for by in (-1, 0, 1)})
    parts = [(a, b) for a in near for b in near if a < b]
    parts += [tuple(sorted(chance.sample(range(ENDS[-1]), 2))) for _ in range(50)]
    for start, stop in parts:
        assert part(path, start, stop) == DATA[start:stop]


@pytest.mark.parametrize("edge", EDGES[:-1])
@pytest.mark.parametrize("last", [False, True])
def test_a_flipped_bit_is_found_by_whoever_reads_its_block(
    path: Path, edge: int, last: bool
) -> None:
    blocks = list(pairwise(EDGES))
    damaged = next(block for block in blocks if block[0] == edge)
    changed = bytearray(DATA)
    changed[damaged[last] - last] ^= 16
    path.write_bytes(changed)
    line = rf"file changed .* bytes {damaged[0]} to {damaged[1] - 1} is \w{{16}}, the manifest says"
    for block in blocks:
        for start, stop in (block, (block[0], block[0] + 1), (block[1] - 1, block[1])):
            if block != damaged:
                part(path, start, stop)
                continue
            with pytest.raises(CheckpointError, match=line):
                part(path, start, stop)
    with pytest.raises(CheckpointError, match=line):
        part(path, 0, ENDS[-1])


def test_a_file_that_was_cut_or_is_gone_and_sums_of_another(path: Path) -> None:
    path.write_bytes(DATA[:-1])
    with pytest.raises(CheckpointError, match=f"ends at byte {len(DATA) - 1}: cut short"):
        part(path, len(DATA) - 5, len(DATA))
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*file: No such file"):
        part(path, 0, 5)
    path.mkdir()  # what a broken disk does to reading, a folder does too
    with pytest.raises(CheckpointError, match=r"cannot read .*file: Is a directory"):
        part(path, 0, 5)
    with pytest.raises(CheckpointError, match="the manifest has 6 checksums for its 7 blocks"):
        BlockVerifier(path, ENDS, SUMS[:-1])


def test_strided_elements_with_and_without_checksums(path: Path) -> None:
    """Columns of a matrix that is wider than what is read, over several windows."""
    whole, copy = torch.zeros(700, 100), StridedCopy(700, 100, 50, 1001, 0, 100)
    matrix = np.frombuffer(DATA[100:], "<f4", 700 * 1001).reshape(700, 1001)[:, 50:150]
    for known in (None, BlockVerifier(path, ENDS, SUMS)):
        read_elements(path, 100, [copy], whole.zero_().view(-1), known)
        assert whole.numpy().tobytes() == matrix.tobytes()
    changed = bytearray(DATA)
    changed[100 + 4 * 1001 * 600] ^= 1
    path.write_bytes(changed)
    with pytest.raises(CheckpointError, match="changed after it was saved"):
        read_elements(path, 100, [copy], whole.view(-1), BlockVerifier(path, ENDS, SUMS))
    path.write_bytes(DATA[: 100 + 4 * 1001 * 600])
    for known in (None, BlockVerifier(path, ENDS, SUMS)):
        with pytest.raises(CheckpointError, match=r"ends at byte \d+: cut short"):
            read_elements(path, 100, [copy], whole.view(-1), known)
