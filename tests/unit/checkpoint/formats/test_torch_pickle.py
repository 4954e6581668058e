"""Pickles: tensors are read, and nothing in them is executed."""

from __future__ import annotations

import json
import os
import pickle
import re
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

from llamax.checkpoint.formats import torch_pickle
from llamax.checkpoint.formats import torch_zip as archive
from llamax.config.model import ModelConfig
from llamax.runtime.errors import CheckpointError

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


# --- pickles -------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def named(module: str, name: str, *arguments: object) -> bytes:
    """A pickle that calls any name."""
    head = b"\x80\x02c" + f"{module}\n{name}\n".encode()
    return head + pickle.dumps(arguments, 2)[2:-1] + b"R."


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


PICKLES = {
    "os.system": pickle.dumps({"a": Calls(os.system, "touch /tmp/owned")}),
    "posix": named("posix", "system", "id"),
    "eval": pickle.dumps(Calls(eval, "__import__('os').system('id')")),
    "getattr chain": named("builtins", "getattr", "x", "__class__"),
    "operator": named("operator", "attrgetter", "__class__.__base__"),
    "dotted name": b"\x80\x04\x8c\x05torch\x8c\x10serialization.os\x93.",
    "load from bytes": named("torch.storage", "_load_from_bytes", b"x"),
    "torch.load": named("torch", "load", "/etc/passwd"),
    "hub": named("torch.hub", "load", "x", "y"),
    "jit": named("torch.jit", "load", "x"),
    "rebuild with odd args": named("torch._utils", "_rebuild_tensor_v2", "x", 1, (2,), (1,), 0, {}),
    "rebuild with too many": named("torch._utils", "_rebuild_tensor_v2"),
    "parameter of nothing": named("torch._utils", "_rebuild_parameter", 1),
    "sparse": named("torch._utils", "_rebuild_sparse_tensor", 1, 2),
    "wrapper": named("torch._tensor", "_rebuild_from_type_v2", len, int, (), {}),
    "numpy": named("numpy.core.multiarray", "_reconstruct", 1, (0,), b"b"),
    "partial": named("functools", "partial", "x"),
    "import": named("importlib", "import_module", "os"),
    "code": named("types", "CodeType", 1),
    "io.open": named("io", "open", "/etc/passwd"),
    "instance": b"\x80\x02(cos\nsystem\nS'id'\no.",
    "inst": b"(S'id'\nios\nsystem\n.",
    "build on a list": b"\x80\x02]}b.",
    "newobj": b"\x80\x02ctorch\nSize\n)\x81.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent other": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "memo bomb": b"\x80\x02]r\xff\xff\xff\x7f.",
    "memo missing": b"\x80\x02h\x05.",
    "long string": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "bytes8": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
    "deep tuples as a key": b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"K\x01s.",
    "deep": b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b".",
    "no stop": b"\x80\x02]",
    "nothing": b".",
    "text": b"hello",
    "marks": b"\x80\x02" + b"(" * 1000 + b".",
    "unhashable": b"\x80\x02}]K\x01s.",
    "not a dict": pickle.dumps([1, 2], 2),
    "huge shape": tensor(0, (1 << 40, 1 << 40), (1 << 40, 1)),
    "many dims": tensor(0, (2,) * 100, (1,) * 100),
    "expanded": tensor(0, (1 << 30,), (0,)),
    "negative": tensor(0, (-4,), (1,)),
    "past the end": tensor(14, (4,), (1,)),
    "negative stride": tensor(8, (4,), (-1,)),
}  # fmt: skip


TOLD = {
    "os.system": "posix.system",
    "dotted name": "serialization.os",
    "rebuild with odd args": "a tensor without a storage",
    "newobj": "an object of",
    "persistent other": "no pickle that|a persistent",
    "memo missing": "KeyError",
    "deep tuples as a key": "a key of type tuple",
    "huge shape": r"a tensor of shape \[1099511627776",
    "many dims": "a tensor with shape or strides",
    "expanded": r"a tensor of shape \[1073741824\] in 16 elements",
    "negative": "a tensor with shape or strides",
    "past the end": r"a tensor of shape \[4\] in 16 elements",
    "negative stride": "a tensor with shape or strides",
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_do_more_than_hold_tensors(
    tmp_path: Path, watched: Watched, name: str
) -> None:
    folder = meta_folder(tmp_path)
    torch_zip(PICKLES[name], folder / "consolidated.00.pth")
    line = watched.read(*argv_of(folder))
    assert "tensors and plain containers only" in line or "not a dict of tensors" in line
    assert re.search(TOLD.get(name, ""), line), line
    assert len(line) < 600
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("protocol", [0, 1])
def test_old_protocols_too(protocol: int) -> None:
    data = pickle.dumps({"a": Calls(os.system, "id")}, protocol)
    with pytest.raises(CheckpointError, match="tensors and plain containers only"):
        torch_pickle.read(data, "file")


def test_structures_that_explode_do_not() -> None:
    """Dicts that share one dict, seven levels deep: 99 ** 7 entries, if each were followed."""
    held: Any = {"x": 1}
    for _ in range(7):
        held = {str(i): held for i in range(99)}
    data = torch_pickle.read(pickle.dumps(held, 2), "file")
    assert len(archive.replaced(data, torch_pickle.Tensor, lambda t: t)) == 99
    loop: dict[str, Any] = {}
    loop["again"] = loop
    data = torch_pickle.read(pickle.dumps(loop, 2), "file")
    assert archive.replaced(data, torch_pickle.Tensor, lambda t: t)["again"]


def test_what_torch_saves_is_read(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(2, 3, 4)
    held = {
        "parameter": torch.nn.Parameter(whole),
        "transposed": whole.transpose(0, 2),
        "slice": whole[:, 1:, ::2],
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.0),
        "half": whole.half(),
        "brain": whole.bfloat16(),
        "int": torch.arange(3),
        "numbers": [1, -2, 1 << 40, 1.5, None, True, "text", (1,), (1, 2, 3, 4)],
        "size": whole.shape,
        "dtype": torch.bfloat16,
        3: {"step": 7},
    }
    for protocol in (2, 4):
        torch.save(held, tmp_path / "x.pt", pickle_protocol=protocol)
        found = archive.load(tmp_path / "x.pt")
        assert [*found] == [*held]
        for name, value in held.items():
            if isinstance(value, torch.Tensor):
                read = found[name].load()
                assert read.dtype == value.dtype
                assert read.is_contiguous()
                assert torch.equal(read, value.detach())
            else:
                assert found[name] == (tuple(value) if name == "size" else value)
    module = torch.nn.Linear(2, 2).state_dict()  # with _metadata beside its entries
    torch.save(module, tmp_path / "m.pt")
    for name, stored in archive.load(tmp_path / "m.pt").items():
        assert torch.equal(stored.load(), module[name])


def test_no_part_of_llamax_loads_a_pickle() -> None:
    """Neither torch.load nor the pickle module is used to read a checkpoint."""
    package = Path(__file__).resolve().parents[4] / "llamax"
    users = [
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for line in path.read_text().splitlines()
        if "torch.load(" in line or line.strip() in ("import pickle", "from pickle import loads")
    ]
    assert users == []
    assert isinstance(MODEL, ModelConfig)
