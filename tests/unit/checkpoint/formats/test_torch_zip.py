"""torch's zip files: sound ones are read, crafted ones are refused."""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.utils.serialization.config as torch_config
from support.hostile import (
    Watched,
    argv_of,
    meta_folder,
    tensor_pickle,
    torch_zip,
)

from llamax.checkpoint.formats import torch_zip as archive
from llamax.runtime.errors import CheckpointError

# --- archives ------------------------------------------------------------------------------------


def deflated(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", pickle.dumps({}, 2))
        file.writestr("a/data/0", b"\0" * (1 << 26))


def overlapping(path: Path) -> None:
    """Many entries that all claim the same bytes."""
    out = io.BytesIO()
    body = b"\0" * (1 << 20)
    out.write(struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, len(body), len(body), 1, 0))
    out.write(b"x" + body)
    start = out.tell()
    for number in range(1000):
        name = f"a/data/{number}".encode()
        out.write(
            struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, len(body), len(body),
                        len(name), 0, 0, 0, 0, 0, 0)
            + name
        )  # fmt: skip
    size = out.tell() - start
    out.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1000, 1000, size, start, 0))
    path.write_bytes(out.getvalue())


def duplicated(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for number in range(2):
            file.writestr(f"archive/data.pk{number}", pickle.dumps({}, 2))
    path.write_bytes(path.read_bytes().replace(b"pk0", b"pkl").replace(b"pk1", b"pkl"))


def directory(count: int, size: int, offset: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, size, offset, 0))

    return write


def sound(path: Path, change: Callable[[bytes], bytes]) -> None:
    torch.save({"tok_embeddings.weight": torch.ones(40, 24)}, path)
    path.write_bytes(change(path.read_bytes()))


ARCHIVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "overlapping": (overlapping, "its entries overlap"),
    "empty": (lambda path: path.write_bytes(b""), "it is not a zip archive"),
    "no zip": (lambda path: path.write_bytes(b"PK" * 99), "it is not a zip archive"),
    "big directory": (directory(9, 0xFFFFFFF0, 0), "its directory claims 4294967280 bytes"),
    "directory outside": (directory(9, 1 << 20, 1 << 30), "its directory claims 1048576 bytes"),
    "zip64 without its end": (
        directory(0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        "the end of its directory is missing",
    ),
    "more entries than there are": (directory(9, 0, 0), "its archive is inconsistent"),
    "two of one name": (duplicated, "its directory is damaged"),
    "no data.pkl": (
        lambda path: sound(path, lambda b: b.replace(b"data.pkl", b"atad.pkl")),
        "it has 0 entries data.pkl",
    ),
    "storage missing": (
        lambda path: sound(path, lambda b: b.replace(b"/data/0", b"/data/9")),
        "storage '0' is missing",
    ),
    "flipped in the pickle": (
        lambda path: sound(path, lambda b: b.replace(b"FloatS", b"floatS", 1)),
        "its structure is damaged",
    ),
    "big endian": (
        lambda path: sound(path, lambda b: b.replace(b"little", b"big   ")),
        "its structure is damaged|byte order",
    ),
    "cut": (lambda path: sound(path, lambda b: b[: len(b) // 2]), "it is not a zip archive"),
    "local header gone": (
        lambda path: sound(path, lambda b: b.replace(b"PK\3\4", b"KP\3\4")),
        "lies outside the file",
    ),
    "short storage": (
        lambda path: torch_zip(tensor_pickle(0, (16,), (1,)), path, b"\0" * 60),
        "missing or short",
    ),
}


def old_format(path: Path) -> None:
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)


def big_endian(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({}, 2))
        file.writestr("archive/byteorder", "big")


def encrypted(path: Path) -> None:
    file = io.BytesIO()
    torch.save({"a": 1}, file)
    data = bytearray(file.getvalue())
    at = data.index(b"PK\1\2")
    data[at + 8] |= 1
    path.write_bytes(data)


def large_structure(path: Path) -> None:
    torch.save({"a": "x" * (65 << 20)}, path)


UNSUPPORTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "deflated": (deflated, "a compressed archive"),
    "encrypted": (encrypted, "an encrypted archive"),
    "before torch 1.6": (old_format, "a file in the format of torch before 1.6"),
    "big endian": (big_endian, "a file of a big-endian machine"),
    "torch.jit": (
        lambda path: torch.jit.script(torch.nn.Linear(2, 2)).save(path),
        "a TorchScript program",
    ),
    "large structure": (large_structure, "a file with 681.* bytes of structure"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b" + bytes(99)), "a gzip file"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_files_of_other_formats_are_unsupported_and_not_damaged(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.pt"
    write, kind = UNSUPPORTED[name]
    write(path)
    with pytest.raises(CheckpointError, match=f"is {kind}, which llamax does not read; load") as e:
        archive.load(path)
    assert "damaged" not in str(e.value)
    assert "complete" not in str(e.value)


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    """``compute_crc32 = False`` writes a CRC of 0 for every entry."""
    whole = {"a": torch.arange(24.0).view(4, 6).bfloat16(), "step": 7}
    before = torch_config.save.compute_crc32
    torch_config.save.compute_crc32 = False
    try:
        torch.save(whole, tmp_path / "x.pt")
    finally:
        torch_config.save.compute_crc32 = before
    with zipfile.ZipFile(tmp_path / "x.pt") as file:
        assert {entry.CRC for entry in file.infolist()} == {0}
    read = archive.load(tmp_path / "x.pt")
    assert torch.equal(read["a"].load(), whole["a"])
    assert read["step"] == 7


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_that_are_not_what_torch_saves(
    tmp_path: Path, watched: Watched, name: str
) -> None:
    folder = meta_folder(tmp_path)
    write, told = ARCHIVES[name]
    write(folder / "consolidated.00.pth")
    line = watched.read(*argv_of(folder))
    assert "consolidated.00.pth is not a complete file of torch.save" in line
    assert re.search(told, line), line
    assert not (tmp_path / "out").exists()


def test_entries_beyond_four_gibibytes(tmp_path: Path) -> None:
    """Sizes and places in the 64-bit fields of the format, on a sparse file."""
    path, far = tmp_path / "x.pt", 5 << 30
    torch.save({"a": torch.arange(8.0)}, tmp_path / "near.pt")
    with zipfile.ZipFile(tmp_path / "near.pt") as near:
        entries = {info.filename: near.read(info) for info in near.infolist()}
    with open(path, "wb") as out:
        out.seek(far)
        with zipfile.ZipFile(out, "w") as archived:
            for name, data in entries.items():
                with archived.open(name, "w", force_zip64=True) as entry:
                    entry.write(data)
    assert torch.equal(archive.load(path)["a"].load(), torch.arange(8.0))


def test_a_view_is_checked_with_all_of_its_storage(tmp_path: Path) -> None:
    """Tensors may share a storage, as those of a buffer of gradients do."""
    buffer = torch.arange(4096, dtype=torch.float32)
    path = tmp_path / "x.pt"
    torch.save({"a": buffer[:64], "b": buffer[64:].view(63, 64)}, path)
    held = archive.load(path)
    assert torch.equal(held["b"].load(), buffer[64:].view(63, 64))
    assert torch.equal(held["a"].load(), buffer[:64])
    content = bytearray(path.read_bytes())
    content[content.find(buffer.numpy().tobytes()) + 4000] ^= 1  # of b alone
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pt: bytes .* do not match their checksum"):
        archive.load(path)["a"].load()
