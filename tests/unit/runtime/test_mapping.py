"""A mapped file that is cut short while in use: one line and exit code 2, never SIGBUS."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llamax.data.header import Header
from llamax.data.megatron import IndexedFile, write_indexed
from llamax.data.token_file import TokenFile, TokenWriter
from llamax.runtime.errors import DataError
from llamax.runtime.mapping import REMEDY, describe_loss, map_file

SIZE = 2**22
START = """
import os, mmap, resource, sys, threading, zlib
from pathlib import Path
import numpy as np
from llamax.runtime.mapping import map_file
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
path = Path(sys.argv[1])
file = open(path, "rb")
"""
READS = {
    "numpy": "np.frombuffer(mapped, np.uint8)[[5, 3_000_000]]",
    "numpy, all": "np.frombuffer(mapped, np.uint16).astype(np.int64)",
    "without the lock": "zlib.crc32(memoryview(mapped))",
    "bytes": "mapped[3_000_000:3_000_100]",
    "in a thread": "t = threading.Thread(target=lambda: zlib.crc32(mapped)); t.start(); t.join()",
}


def run(path: Path, *lines: str) -> subprocess.CompletedProcess[str]:
    path.write_bytes(b"x" * SIZE)
    script = "\n".join([START, *lines, 'print("still here")'])
    return subprocess.run(
        [sys.executable, "-c", script, str(path)], text=True, capture_output=True, timeout=300
    )


MAPPED = "mapped = map_file(file.fileno(), path)"
PART = "mapped = map_file(file.fileno(), path, 2**20, 2**20)"  # behind the place of the cut
CLOSED = "closed = map_file(file.fileno(), path); closed.close(); "


@pytest.mark.parametrize(
    ("how", "read"),
    [
        *((MAPPED, each) for each in READS.values()),
        (PART, "mapped[5]"),
        (CLOSED + PART, "mapped[5]"),
    ],
    ids=[*READS, "a part", "a part, beside a closed map"],
)
def test_a_file_that_is_cut_short_is_named(tmp_path: Path, how: str, read: str) -> None:
    path = tmp_path / "to\x1bkens"
    done = run(path, how, "os.truncate(path, 8192)", read)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"llamax: {tmp_path}/to\\x1bkens: was cut short while it was in use: it has 8192 bytes of "
        f"{SIZE}; put the whole file back and start again; a file in use is replaced by renaming "
        "a new one\n"
    )


@pytest.mark.parametrize(
    "ours", ["map_file(file.fileno(), path)", "map_file(file.fileno(), path).close()"]
)
def test_other_maps_end_as_they_did(tmp_path: Path, ours: str) -> None:
    done = run(
        tmp_path / "x",
        f"mapped = {ours}",
        "other = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)",
        "os.truncate(path, 0)",
        "other[5000]",
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGBUS, "", "")


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc" * 5000)
    with open(path, "rb") as file:
        assert map_file(file.fileno(), path)[4096 * 3 :] == (b"abc" * 5000)[4096 * 3 :]
        assert map_file(file.fileno(), path, 10, 4096)[:3] == b"bca"
        with pytest.raises(ValueError, match="greater than file size"):
            map_file(file.fileno(), path, 20_000)
    failed = f"{path}: its disk failed while it was in use; {REMEDY}"
    assert describe_loss(15_000, 15_000, path) == failed


@pytest.mark.parametrize("kind", ["llamax", "megatron"])
def test_a_dataset_that_shrinks_by_a_few_bytes(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "train.tokens"
    with TokenWriter(path, Header("f" * 64, 300)) as writer:
        writer.add(np.arange(200, dtype=np.uint16), np.array([150, 50]), 400)
    dataset: TokenFile | IndexedFile = TokenFile(path)
    if kind == "megatron":
        write_indexed(tmp_path / "old", [TokenFile(path)], 300)
        dataset, path = IndexedFile(tmp_path / "old"), tmp_path / "old.bin"
    place = np.zeros(1, np.int64)
    dataset.touch(place, place + 10)
    whole = path.read_bytes()
    path.write_bytes(whole[:-6])
    with pytest.raises(DataError, match=rf"{path}: was cut short .*: it has \d+ bytes of"):
        dataset.touch(place, place + 10)
