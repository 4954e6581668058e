"""safetensors headers: sound files are read, damaged headers are refused."""

from __future__ import annotations

import errno
import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.saving import refused
from torch import Tensor

from llamax.checkpoint import safetensors_io
from llamax.checkpoint.checksums import BlockVerifier
from llamax.checkpoint.runs import StridedCopy
from llamax.checkpoint.safetensors_io import (
    TensorEntry,
    TensorStream,
    read_elements,
    read_header,
    write_safetensors,
)


def header(path: Path, text: bytes, data: bytes = b"", length: int | None = None) -> Path:
    claimed = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", claimed) + text + data)
    return path


def one(dtype: Any = "F32", shape: Any = (2,), extent: Any = (0, 8), **more: Any) -> bytes:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": extent}
    return json.dumps({"a": entry, **more}).encode()


@pytest.mark.parametrize(
    ("match", "text", "length"),
    [
        (r"claims \d+ of", one(), 1 << 62),
        ("claims 99 of", one(), 99),
        ("not JSON", b"{" * 40, None),
        ("nested more than 64 levels deep", b"[" * 100_000, None),
        ("not a JSON object", b"[]", None),
        ("entry of a is malformed", b'{"a": 3}', None),
        ("entry of a is malformed", one(extent=(0,)), None),
        ("has dtype F8_E4M3", one(dtype="F8_E4M3"), None),
        (r"has dtype \['F32'\]", one(dtype=["F32"]), None),
        ("has the invalid shape", one(shape=(-2,)), None),
        ("has the invalid shape", one(shape=("2",)), None),
        ("does not fit its 8 bytes", one(shape=(1 << 40, 1 << 40)), None),
        ("a gap or overlap at byte 8", one(b=json.loads(one())["a"]), None),
        ("a gap or overlap at byte 0", one(extent=(8, 16)), None),
        (r"end at byte \d+, the file has", one(shape=(1,), extent=(0, 4)), None),
    ],
)
def test_safetensors_headers(tmp_path: Path, match: str, text: bytes, length: int | None) -> None:
    path = header(tmp_path / "x.safetensors", text, bytes(8), length)
    refused(match, lambda: read_header(path))


def test_a_whole_container_is_read(tmp_path: Path) -> None:
    path = header(tmp_path / "x.safetensors", one(), bytes(8))
    assert read_header(path) == {"a": TensorEntry(torch.float32, (2,), 8 + len(one()))}
    refused("cannot read .*nothing", lambda: read_header(tmp_path / "nothing"))
    into, copy = torch.zeros(4), StridedCopy(1, 4, 0, 4, 0, 4)
    refused("ends at byte .*: cut short", lambda: read_elements(path, 8 + len(one()), [copy], into))
    refused("cannot read .*nothing", lambda: read_elements(tmp_path / "nothing", 0, [copy], into))


def chunked(*sizes: int) -> TensorStream:
    """A tensor whose chunks lie in the same memory, one after another."""

    def chunks() -> Iterator[Tensor]:
        buffer = torch.zeros(max(sizes), dtype=torch.uint8)
        for number, size in enumerate(sizes):
            buffer[:] = number + 1
            yield buffer[:size]

    return TensorStream("a", torch.uint8, (sum(sizes),), chunks())


def test_chunks_are_hashed_as_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_io, "SYNC_BYTES", 2**20)
    path = tmp_path / "f.safetensors"
    written = write_safetensors(path, [chunked(3 * 2**20, 5, 2**20 + 1, 2**21)])
    assert written.size_bytes == path.stat().st_size
    entry = read_header(path)["a"]
    assert written.header_bytes == entry.offset
    blocks = BlockVerifier(path, [entry.offset, path.stat().st_size], written.sums)
    into = torch.empty(entry.shape, dtype=torch.uint8)
    copy = StridedCopy(1, len(into), 0, len(into), 0, len(into))
    read_elements(path, entry.offset, [copy], into, blocks)
    ends = [(3 << 20) - 1, 3 << 20, (3 << 20) + 5, (4 << 20) + 6]
    assert into[ends].tolist() == [1, 2, 3, 4]


def test_a_large_chunk_is_synced_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_io, "SYNC_BYTES", 2**20)
    synced, write = threading.Event(), safetensors_io._write_at

    def write_at(fd: int, data: memoryview, offset: int) -> None:
        assert offset < 4 * 2**20 or synced.wait(60), "nothing is synced before the last piece"
        write(fd, data, offset)

    monkeypatch.setattr(safetensors_io, "_write_at", write_at)
    monkeypatch.setattr(safetensors_io, "sync_handle", lambda handle, path: synced.set())
    write_safetensors(tmp_path / "f.safetensors", [chunked(8 * 2**20)])


def test_a_disk_that_fails_meanwhile_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of an early sync counts: the last one would not see it again."""
    monkeypatch.setattr(safetensors_io, "SYNC_BYTES", 2**20)
    real, calls = safetensors_io.sync_handle, []

    def fail_once(handle: int, path: Path) -> None:
        calls.append(handle)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")
        real(handle, path)

    monkeypatch.setattr(safetensors_io, "sync_handle", fail_once)
    words = "cannot write .*f.safetensors: Input/output error"
    refused(words, lambda: write_safetensors(tmp_path / "f.safetensors", [chunked(2**21, 8)]))
