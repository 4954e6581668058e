"""Packed files: the bytes of the plain ones, or one line; never more in memory than a block."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
import zstandard
from support.packed import PACK

from llamax.data.prepare.file_kinds import is_packed, kind_of, lines_in, reading, refuse_packed
from llamax.data.prepare.unpack import BLOCK_BYTES
from llamax.runtime.errors import DataError

chance = random.Random(0)
WORDS = b"".join(b"%d rivers %d\n" % (n, chance.randrange(10**6)) for n in range(40_000))
NOISE = chance.randbytes(300_000)
TEXT = WORDS + NOISE + bytes(400_000) + WORDS[::-1]
SKIPPED = b"\x5f\x2a\x4d\x18" + (300_000).to_bytes(4, "little") + bytes(300_000)


def _zstd(*options: str) -> Callable[[bytes], bytes]:
    return lambda raw: _by_program("zstd", "-q", "-c", *options)(raw)


def _by_program(*command: str) -> Callable[[bytes], bytes]:
    def pack(raw: bytes) -> bytes:
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not installed")
        return subprocess.run(command, input=raw, capture_output=True, check=True).stdout

    return pack


def _sized(**parts: bool) -> Callable[[bytes], bytes]:
    """A frame with some of: its size, a checksum."""
    return lambda raw: zstandard.ZstdCompressor(3, **parts).compress(raw)


WAYS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    **{f"{ending} of Python": (ending, pack) for ending, pack in PACK.items()},
    **{
        f"{ending} of Python, twice": (ending, lambda raw, pack=pack: pack(raw[:9]) + pack(raw[9:]))
        for ending, pack in PACK.items()
    },
    ".xz, padded": (".xz", lambda raw: PACK[".xz"](raw[:99]) + bytes(8) + PACK[".xz"](raw[99:])),
    ".xz, padded by much": (".xz", lambda raw: PACK[".xz"](raw) + bytes(2 * BLOCK_BYTES)),
    ".xz, many blocks": (".xz", _by_program("xz", "-cT2", "--block-size=100KiB")),
    ".bz2 of bzip2": (".bz2", _by_program("bzip2", "-c1")),
    ".zst without size": (".zst", _sized(write_content_size=False, write_checksum=True)),
    ".zst without checksum": (".zst", _sized(write_content_size=True, write_checksum=False)),
    ".zst of an empty text": (".zst", lambda raw: _sized()(b"") + _sized()(raw) + _sized()(b"")),
    ".zst, parts passed over": (".zst", lambda raw: SKIPPED + _sized()(raw) + SKIPPED),
    ".zst of zstd": (".zst", _zstd("-19")),
    ".zst, raw blocks": (".zst", _zstd("--fast=5", "--no-check")),
    ".zst, long window": (".zst", _zstd("--long=31")),
    ".zst, several threads": (".zst", _zstd("-T2", "-B1MiB")),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_bytes_are_those_of_the_plain_file(tmp_path: Path, way: str) -> None:
    ending, pack = WAYS[way]
    path = tmp_path / f"A.JSONL{ending.upper()}"
    path.write_bytes(pack(TEXT))
    assert is_packed(path)
    assert kind_of(path) == "jsonl"
    with reading(path) as file:
        assert file.read() == TEXT
        assert file.read(1) == b""
        for at in (5, 700_000, 1_000_000, 3, 999_999, len(TEXT) - 2, 0, len(TEXT) + 5):
            file.seek(at)
            assert file.read(9) == TEXT[at : at + 9]
    with reading(path) as file:
        lines = list(lines_in(file, "a", 2**21))
    assert lines == [line + b"\n" for line in TEXT.split(b"\n")][:-1] + [TEXT.split(b"\n")[-1]]


def test_frames_of_many_threads(tmp_path: Path) -> None:
    if shutil.which("pzstd") is None:
        pytest.skip("pzstd is not installed")
    (tmp_path / "a.txt").write_bytes(TEXT * 4)
    subprocess.run(["pzstd", "-q", "-p", "2", "a.txt"], cwd=tmp_path, check=True)
    with reading(tmp_path / "a.txt.zst") as file:
        assert file.read() == TEXT * 4


def _read_through(file: IO[bytes]) -> None:
    while file.read(100):
        pass


@pytest.mark.parametrize("ending", PACK)
def test_a_file_that_is_cut_or_damaged_is_refused(tmp_path: Path, ending: str) -> None:
    path, whole = tmp_path / f"a.txt{ending}", PACK[ending](WORDS[:500])
    after = PACK[ending](b"more")
    cases = [whole[:size] for size in range(1, len(whole))]
    cases += [whole + after[:size] for size in range(4, len(after))]
    cases += [whole + b"something else", b"something else", b"\1"]
    for place in range(len(whole) // 2, len(whole) // 2 + 40):
        cases.append(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
    for raw in cases:
        path.write_bytes(raw)
        with (
            pytest.raises(DataError, match=rf"^[^\n]*a\.txt\{ending}: cannot be read \(.+\); rep"),
            reading(path) as file,
        ):
            _read_through(file)


@pytest.mark.parametrize("ending", [".bz2", ".xz", ".zst"])
def test_a_small_file_that_holds_very_much_is_read_in_blocks(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(PACK[ending](bytes(2**26)))
    assert path.stat().st_size < 2**14
    tracemalloc.start()
    try:
        with reading(path) as file:
            assert sum(map(len, iter(lambda: file.read(2**16), b""))) == 2**26
        assert tracemalloc.get_traced_memory()[1] < 2**24, "8 MiB are the window of .xz"
    finally:
        tracemalloc.stop()


def test_what_is_not_unpacked_is_refused_by_name() -> None:
    for name in ("a.zip", "a.tar", "A.TAR.ZST", "a.tar.gz", "a.tar.xz", "a.tbz2", "a.jsonl.lz4"):
        with pytest.raises(DataError, match=r"is packed \(\.\S+\); .* \.gz, \.bz2, \.xz or \.zst"):
            refuse_packed(Path(name))
    for name in ("a.target", "a.jsonl.zst", "zst", "a.xz.txt"):
        refuse_packed(Path(name))


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python reads .zst itself")
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(PACK[".zst"](b"{}"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    missing = r"a\.jsonl\.zst: \.zst needs the package zstandard, .*pip install 'llamax\[zstd\]'"
    with pytest.raises(DataError, match=missing):
        refuse_packed(path)
    with pytest.raises(DataError, match=missing), reading(path):
        pass
    refuse_packed(tmp_path / "a.jsonl.xz")
