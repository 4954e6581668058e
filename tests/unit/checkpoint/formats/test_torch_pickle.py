"""Pickles: tensors are read, and nothing in them is executed."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import functools
import io
import os
import pickle
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.hostile import (
    MODEL,
    Watched,
    argv_of,
    meta_folder,
    tensor_pickle,
    torch_zip,
)

from llamax.checkpoint.formats import torch_pickle
from llamax.checkpoint.formats import torch_zip as archive
from llamax.checkpoint.formats.xser import load_file, stored_tensors
from llamax.config.model import ModelConfig
from llamax.runtime.errors import CheckpointError

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
    "huge shape": tensor_pickle(0, (1 << 40, 1 << 40), (1 << 40, 1)),
    "many dims": tensor_pickle(0, (2,) * 100, (1,) * 100),
    "expanded": tensor_pickle(0, (1 << 30,), (0,)),
    "negative": tensor_pickle(0, (-4,), (1,)),
    "past the end": tensor_pickle(14, (4,), (1,)),
    "negative stride": tensor_pickle(8, (4,), (-1,)),
}  # fmt: skip


TOLD = {
    "os.system": "posix.system",
    "dotted name": "serialization.os",
    "rebuild with odd args": "a tensor without a storage",
    "newobj": "an object of",
    "persistent other": "a pickle that torch.save did not|a persistent",
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
        torch_pickle.read_pickle(data, "file")


HIDDEN = {
    "os.system in args": {"args": argparse.Namespace(x=Calls(os.system, "touch /tmp/owned"))},
    "subprocess in a list": {"rng_state": [Calls(subprocess.call, "id")]},
    "eval as a value of a set": {"x": {Calls(eval, "1")}},
    "exec as a key": {"x": {Calls(exec, "1"): 1}},
    "open": {"x": Calls(open, "/etc/passwd")},
}


@pytest.mark.parametrize("name", HIDDEN)
def test_code_beside_tensors_ends_the_reading(tmp_path: Path, watched: Watched, name: str) -> None:
    """Data is skipped, a name that runs code is not: the line names it."""
    folder = meta_folder(tmp_path)
    torch.save({"tok_embeddings.weight": torch.ones(2)} | HIDDEN[name], folder / "x.pth")
    (folder / "x.pth").rename(folder / "consolidated.00.pth")
    assert re.search(r"holds [a-z_.]+, which runs code", watched.read(*argv_of(folder)))


class Color(enum.Enum):
    RED = 1


class ListOfOurs(list):  # type: ignore[type-arg]
    pass


class DictOfOurs(dict):  # type: ignore[type-arg]
    pass


class Slotted:
    __slots__ = ("a",)

    def __init__(self) -> None:
        self.a = 1


DATA = {
    "namespace": argparse.Namespace(lr=0.1, kind=Color.RED, dtype=torch.bfloat16, act=len),
    "enum": Color.RED,
    "numpy": np.arange(6.0).reshape(2, 3),
    "numpy number": np.float32(2),
    "numpy state": np.random.default_rng(1).bit_generator.state,
    "old numpy state": np.random.RandomState(1).get_state(),
    "python state": random.Random(1).getstate(),
    "bytes": b"abc",
    "bytearray": bytearray(b"abc"),
    "buffer": io.BytesIO(b"abc"),
    "set": {1, "a"},
    "frozenset": frozenset({2}),
    "deque": collections.deque([1, 2]),
    "counter": collections.Counter("aab"),
    "list of ours": ListOfOurs([1]),
    "dict of ours": DictOfOurs(a=1),
    "slots": Slotted(),
    "path": Path("/tmp"),
    "partial": functools.partial(sorted, key=len),
    "complex": 1 + 2j,
    "slice": slice(1, 2),
    "large": 1 << 4000,
    "keys": {(1, "a"): 1, None: 2, 1.5: 3, b"x": 4, Color.RED: 5, True: 6, torch.float32: 7},
    "type": Slotted,
    "date": datetime.date(2026, 1, 1),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_beside_tensors_are_skipped(tmp_path: Path, protocol: int) -> None:
    """What argparse, numpy, random and a framework leave in a checkpoint is not built."""
    loop: list[Any] = []
    loop.append((loop,))
    held = {"before": torch.ones(2), **DATA, "loop": loop, "after": torch.arange(3)}
    torch.save(held, tmp_path / "x.pt", pickle_protocol=protocol)
    read = archive.load(tmp_path / "x.pt")
    assert set(read) == set(held)
    assert torch.equal(read["before"].load(), held["before"])
    assert torch.equal(read["after"].load(), held["after"])
    for name in ("namespace", "enum", "numpy", "buffer", "set", "dict of ours", "slots", "path"):
        assert isinstance(read[name], torch_pickle.InertObject), name
    assert repr(read["namespace"]) == "argparse.Namespace"
    assert protocol == 2 or read["bytes"] == b"abc"


def test_default_dicts_and_tensors_with_attributes(tmp_path: Path) -> None:
    """A defaultdict is a dict, and a parameter keeps its data beside its attributes."""
    marked = torch.nn.Parameter(torch.arange(4.0))
    marked.partition_dim = 0  # type: ignore[attr-defined]
    tensor = torch.arange(5.0)
    tensor.tensor_model_parallel = True  # type: ignore[attr-defined]
    held = collections.defaultdict(int, {"a": marked, "b": tensor})
    torch.save(held, tmp_path / "x.pt")
    read = archive.load(tmp_path / "x.pt")
    assert torch.equal(read["a"].load(), marked.detach())
    assert torch.equal(read["b"].load(), tensor)


UNREAD = {
    "float8": torch.ones(4).to(torch.float8_e4m3fn),
    "complex": torch.ones(4, dtype=torch.complex64),
    "unsigned": torch.ones(4, dtype=torch.uint16),
    "sparse": torch.eye(4).to_sparse(),
    "meta": torch.ones(4, device="meta"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNREAD)
def test_tensors_that_llamax_does_not_read_are_named(tmp_path: Path, name: str) -> None:
    torch.save({"module": {"x.weight": UNREAD[name]}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"module\.x\.weight is .*which llamax does not read"):
        dict(stored_tensors(load_file(tmp_path, tmp_path / "x.pt"), tmp_path / "x.pt"))


def test_whole_modules_are_named(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"holds torch\.nn\.modules\.linear\.Linear, not a"):
        load_file(tmp_path, tmp_path / "x.pt")


def test_structures_that_explode_do_not() -> None:
    """Dicts that share one dict, seven levels deep: 99 ** 7 entries, if each were followed."""
    held: Any = {"x": 1}
    for _ in range(7):
        held = {str(i): held for i in range(99)}
    data = torch_pickle.read_pickle(pickle.dumps(held, 2), "file")
    copied = archive.replace_values(data, torch_pickle.PickledTensor, lambda t: t)
    assert len(copied) == 99
    with pytest.raises(CheckpointError, match=r"x\.pt holds more than 1048576 values"):
        list(stored_tensors(copied, Path("x.pt")))
    loop: dict[str, Any] = {}
    loop["again"] = loop
    data = torch_pickle.read_pickle(pickle.dumps(loop, 2), "file")
    assert archive.replace_values(data, torch_pickle.PickledTensor, lambda t: t)["again"]


DOUBLED = b")" + b"q\0h\0\x86" * 60  # a tuple of itself twice, 60 times


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("tail", "words"),
    {
        b")R.": "a call of a tuple",
        b"K\1R.": "a call of a tuple",
        b")\x81.": "an object of a tuple",
        b"(h\0NNNNtQ.": "a persistent a tuple",
    }.items(),
)
def test_messages_do_not_grow_with_nested_tuples(tail: bytes, words: str) -> None:
    """The text of this tuple would take 2 ** 60 characters."""
    with pytest.raises(CheckpointError, match=words) as refused:
        torch_pickle.read_pickle(b"\x80\2" + DOUBLED + tail, "file")
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("at", range(1, 4))
def test_messages_about_tensors_do_not_grow_with_nested_tuples(at: int) -> None:
    nested: Any = ()
    for _ in range(60):
        nested = (nested, nested)
    storage = torch_pickle.PickledStorage("0", torch.float32, 4)
    arguments: list[Any] = [storage, 0, (2, 2), (2, 1)]
    arguments[at] = nested
    with pytest.raises(torch_pickle.UnsupportedPickle, match="a tuple"):
        torch_pickle._tensor(*arguments)
    arguments[at] = -1 if at == 1 else (-1,)
    with pytest.raises(torch_pickle.UnsupportedPickle, match="-1"):
        torch_pickle._tensor(*arguments)


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
