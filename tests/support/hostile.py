"""Hostile checkpoints, and a process under an audit hook that reads them."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

import support.checkpoints as worlds
import support.foreign_megatron as foreign_megatron

GUARD = """
import os, sys
allowed, secret = os.path.realpath(sys.argv[1]), os.path.realpath(sys.argv[2])
import multiprocessing.synchronize, tqdm
from llamax.checkpoint.formats import convert, torch_zip, meta, nemo, nxd, optimum, xser
from llamax.cli import export, import_
from llamax.checkpoint.hf_folder import HfFolder
from llamax.config.load import load_config
from llamax.config.model import ModelConfig
from llamax.config.schema import Config
from llamax.config.types import type_hints
from llamax.runtime.process import run_main
from llamax.runtime import progress
progress.FIRST_S = 1e6  # no line but the one that refuses, however slow the machine is
import torch
for kind in (Config, *type_hints(Config).values()):  # these compile text, once
    type_hints(kind)
EXECUTES = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "exec",
            "compile", "pickle.find_class", "socket.connect", "ctypes.dlopen", "shutil.rmtree",
            "os.remove", "os.rename", "os.kill")
PYTHON = (sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(torch.__file__)),
          os.path.dirname(os.path.realpath(nxd.__file__)), "/usr/lib", "/proc/self")
load_config("demo")  # pydantic compiles its validators at their first use
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
            return run_main(lambda _: ModelConfig.from_hub(HfFolder(argv[1]).model) and 0, [])
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
        self.secret.mkdir(exist_ok=True)
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


MODEL = worlds.llama(kv=2, vocabulary=40)


def meta_folder(tmp_path: Path) -> Path:
    """A sound folder to spoil; its config is beside it."""
    folder = foreign_megatron.meta(tmp_path / "in", worlds.wholes(MODEL, torch.bfloat16), MODEL)
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


def tensor_pickle(start: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    numbers = b"".join(
        pickle.dumps(n, 2)[2:-1].replace(b"q\x00", b"") for n in (start, shape, strides)
    )
    return (
        b"\x80\x02}X\x15\x00\x00\x00tok_embeddings.weightctorch._utils\n_rebuild_tensor_v2\n("
        + STORAGE
        + numbers
        + b"\x89}tRs."
    )
