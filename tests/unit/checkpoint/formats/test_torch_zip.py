"""torch's zip files: sound ones are read, crafted ones are refused."""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support.checkpoints as worlds
import support.foreign as foreign
import torch

from llamax.checkpoint.formats import torch_zip as archive

GUARD = """
import os, sys
allowed, secret = os.path.realpath(sys.argv[1]), os.path.realpath(sys.argv[2])
from llamax.checkpoint.formats import torch_zip, meta, nemo, nxd, optimum
from llamax.cli import export, import_
from llamax.checkpoint.hf_folder import HubFolder
from llamax.config.model import ModelConfig
from llamax.runtime.process import run_main
import torch
EXECUTES = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "exec",
            "compile", "pickle.find_class", "socket.connect", "ctypes.dlopen", "shutil.rmtree",
            "os.remove", "os.rename", "os.kill")
PYTHON = (sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(torch.__file__)),
          os.path.dirname(os.path.realpath(nxd.__file__)), "/usr/lib", "/proc/self")
watching = False
def hook(event, args):
    if not watching:
        return
    if event in EXECUTES and not (event in ("os.remove", "os.rename", "shutil.rmtree")
                                  and allowed in str(args[0])):
        os.write(2, f"EXECUTED {event} {args!r:.200}\\n".encode())
        os._exit(99)
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        path = os.path.realpath(os.fsdecode(args[0]))
        if path.startswith(secret) or not path.startswith((allowed, *PYTHON)):
            os.write(2, f"OPENED {path}\\n".encode())
            os._exit(98)
sys.addaudithook(hook)
def attempt(argv):
    global watching
    watching = True
    try:
        if argv[0] == "hub":
            return run_main(lambda _: ModelConfig.from_hub(HubFolder(argv[1]).model) and 0, [])
        return run_main(import_.main, argv)
    finally:
        watching = False
for line in sys.stdin:
    print("code", attempt(line.rstrip("\\n").split("\\t")), flush=True)
    print("end", file=sys.stderr, flush=True)
"""


class Watched:
    """A process that reads hostile folders one after another."""

    def __init__(self, home: Path) -> None:
        self.secret = home / "secret-outside"
        self.secret.mkdir()
        (self.secret / "key").write_text("do not read")
        self.process = subprocess.Popen(
            [sys.executable, "-c", GUARD, str(home), str(self.secret)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def read(self, *argv: object) -> str:
        """The one line that refuses."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdin.write("\t".join(map(str, argv)) + "\n")
        self.process.stdin.flush()
        code = self.process.stdout.readline().split()
        assert code, f"died: {self.process.stderr.read()}"
        lines = []
        while (line := self.process.stderr.readline()) != "end\n":
            lines.append(line)
        assert code == ["code", "2"], (code, lines)
        assert len(lines) == 1, lines
        assert lines[0].startswith("llamax: ")
        return lines[0]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    guard = Watched(tmp_path_factory.getbasetemp())
    yield guard
    assert guard.process.stdin is not None
    guard.process.stdin.close()
    assert guard.process.wait(30) == 0


MODEL = worlds.llama(kv=2, vocabulary=40)


def meta_folder(tmp_path: Path) -> Path:
    """A sound folder to spoil; its config is beside it."""
    folder = foreign.meta(tmp_path / "in", worlds.wholes(MODEL, torch.bfloat16), MODEL)
    (tmp_path / "config.json").write_text(json.dumps(MODEL.to_hub("bfloat16")))
    return folder


def argv_of(folder: Path) -> list[object]:
    out = folder.parent / "out"
    return [folder, "--out", out, "--config", folder.parent / "config.json"]


def torch_zip(pickled: bytes, path: Path, storage: bytes = b"\0" * 64) -> None:
    """A file like torch.save's around a pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/data/0", storage)
        file.writestr("archive/version", "3\n")


STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x10tQ"
)


def tensor(start: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    numbers = b"".join(
        pickle.dumps(n, 2)[2:-1].replace(b"q\x00", b"") for n in (start, shape, strides)
    )
    return (
        b"\x80\x02}X\x15\x00\x00\x00tok_embeddings.weightctorch._utils\n_rebuild_tensor_v2\n("
        + STORAGE
        + numbers
        + b"\x89}tRs."
    )


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
    "deflated": (deflated, "is compressed"),
    "overlapping": (overlapping, "its entries overlap"),
    "empty": (lambda path: path.write_bytes(b""), "it is no zip archive"),
    "no zip": (
        lambda path: path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." * 9),
        "it is no zip archive",
    ),
    "big directory": (directory(9, 0xFFFFFFF0, 0), "its directory claims 4294967280 bytes"),
    "directory outside": (directory(9, 1 << 20, 1 << 30), "its directory claims 1048576 bytes"),
    "zip64 without its end": (
        directory(0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        "the end of its directory is missing",
    ),
    "more entries than there are": (directory(9, 0, 0), "contradicts itself"),
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
    "cut": (lambda path: sound(path, lambda b: b[: len(b) // 2]), "it is no zip archive"),
    "local header gone": (
        lambda path: sound(path, lambda b: b.replace(b"PK\3\4", b"KP\3\4")),
        "lies outside the file",
    ),
    "short storage": (
        lambda path: torch_zip(tensor(0, (16,), (1,)), path, b"\0" * 60),
        "missing or short",
    ),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_that_are_not_what_torch_saves(
    tmp_path: Path, watched: Watched, name: str
) -> None:
    folder = meta_folder(tmp_path)
    write, told = ARCHIVES[name]
    write(folder / "consolidated.00.pth")
    line = watched.read(*argv_of(folder))
    assert "consolidated.00.pth is no whole file of torch.save" in line
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
