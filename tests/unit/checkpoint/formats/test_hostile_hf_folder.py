"""Hugging Face folders from outside: crafted headers, indexes and links are refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import support.checkpoints as worlds
import support.foreign as foreign
import support.foreign_megatron as foreign_megatron
import torch
from safetensors.torch import save_file
from support.hostile import MODEL, Watched, argv_of, meta_folder

from llamax.checkpoint.hf_folder import HfFolder
from llamax.cli.import_ import main as import_main
from llamax.runtime.errors import LlamaxError
from llamax.runtime.process import run_main

# --- folders -------------------------------------------------------------------------------------


def hub_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "hub"
    folder.mkdir()
    weights = {n: v for (n, kind), v in worlds.wholes(MODEL).items() if kind == "weight"}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(MODEL.to_hub("float32")))
    return folder


def with_index(folder: Path, file: object) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    weight_map = {name: file for name in ("model.norm.weight",)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def header(folder: Path, text: bytes, claim: int | None = None) -> None:
    claimed = len(text) if claim is None else claim
    (folder / "model.safetensors").write_bytes(claimed.to_bytes(8, "little") + text)


def config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def linked(folder: Path, name: str, to: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(to)


def one(**entry: object) -> bytes:
    return json.dumps(
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **entry}}
    ).encode()


HUBS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "index to the parent": (lambda f, s: with_index(f, "../secret/key"), "is not a file beside it"),
    "index to an absolute path": (
        lambda f, s: with_index(f, str(s / "key")), "is not a file beside it"),
    "index to a folder": (lambda f, s: with_index(f, ".."), "is not a file beside it|link out"),
    "index to a number": (lambda f, s: with_index(f, 7), "is not a file beside it"),
    "weights linked": (lambda f, s: linked(f, "model.safetensors", s / "key"), "link out of"),
    "config linked": (lambda f, s: linked(f, "config.json", s / "key"), "link out of"),
    "index linked": (
        lambda f, s: linked(f, "model.safetensors.index.json", s / "key"), "link out of"),
    "tokenizer linked": (lambda f, s: linked(f, "tokenizer.json", s / "key"), "link out of"),
    "folder linked inside": (lambda f, s: linked(f, "tokenizer.model", s), "link out of"),
    "a pipe": (lambda f, s: (os.remove(f / "config.json"), os.mkfifo(f / "config.json")),
               "not a plain file"),
    "weights a pipe": (
        lambda f, s: (os.remove(f / "model.safetensors"), os.mkfifo(f / "model.safetensors")),
        "not a plain file"),
    "weights a folder": (
        lambda f, s: (os.remove(f / "model.safetensors"), os.mkdir(f / "model.safetensors")),
        "not a plain file"),
    "header bomb": (lambda f, s: header(f, b"{}", 1 << 40), "its header claims"),
    "header of 64 bits": (lambda f, s: header(f, b"{}", (1 << 64) - 1), "its header claims"),
    "large header": (lambda f, s: header(f, b" " * (17 << 20)), "its header claims"),
    "deep header": (lambda f, s: header(f, b"[" * 100_000), "nested more than 64 levels deep"),
    "long number": (lambda f, s: header(f, b'{"a": ' + b"9" * 100_000 + b"}"), "100000 digits"),
    "many dims": (lambda f, s: header(f, one(shape=[2] * 100_000)), "has the invalid shape"),
    "huge shape": (lambda f, s: header(f, one(shape=[10**30, 10**30])), "has the invalid shape"),
    "negative": (lambda f, s: header(f, one(shape=[-1, -1])), "has the invalid shape"),
    "unknown dtype": (lambda f, s: header(f, one(dtype="F8_E4M3")), "has dtype F8_E4M3"),
    "dtype of two lines": (lambda f, s: header(f, one(dtype="F32\nF")), r"has dtype 'F32\\nF'"),
    "name of two lines": (
        lambda f, s: header(f, one(dtype="F9").replace(b'"x"', b'"x\\ny"')), r"'x\\ny' has dtype"),
    "code in the config": (
        lambda f, s: config(f, auto_map={"AutoModel": "evil.Evil"}), "auto_map asks for code"),
    "remote code": (lambda f, s: config(f, trust_remote_code=True), "asks for code"),
    "layers without end": (lambda f, s: config(f, num_hidden_layers=10**12), "from 1 to 16384"),
    "layers that are not there": (
        lambda f, s: config(f, num_hidden_layers=16384), "states num_hidden_layers=16384, but"),
    "a width without end": (lambda f, s: config(f, hidden_size=10**15), "from 1 to 268435456"),
    "only a pickle": (
        lambda f, s: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "a pickle"),
    "deep config": (lambda f, s: (f / "config.json").write_text("[" * 100_000), "is nested more"),
}  # fmt: skip


@pytest.mark.parametrize("name", HUBS)
def test_hugging_face_folders(tmp_path: Path, watched: Watched, name: str) -> None:
    folder = hub_folder(tmp_path)
    spoil, told = HUBS[name]
    spoil(folder, watched.secret)
    line = watched.read("hub", folder)
    assert re.search(told, line), line
    assert len(line) < 700


def test_a_sound_folder_is_opened(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path)
    assert len(HfFolder(folder).names()) == 21
    snapshot = tmp_path / "cache" / "snapshots" / "abc"
    blobs = tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("model.safetensors", "config.json"):
        (folder / name).rename(blobs / name)
        (snapshot / name).symlink_to(blobs / name)
    assert len(HfFolder(snapshot).names()) == 21


@pytest.mark.parametrize(
    "what", ["rank", "tensor", "info", "metadata", "meta", "nemo", "tokenizer"]
)
def test_links_out_of_a_foreign_folder(tmp_path: Path, watched: Watched, what: str) -> None:
    values = worlds.wholes(MODEL, torch.bfloat16)
    (tmp_path / "config.json").write_text(json.dumps(MODEL.to_hub("bfloat16")))
    folder = tmp_path / "in"
    if what == "meta":
        folder = meta_folder(tmp_path)
        path = folder / "consolidated.00.pth"
    elif what == "nemo":
        path = foreign_megatron.nemo(folder, values, MODEL) / "model_weights.ckpt"
    elif what == "metadata":
        path = (
            foreign.optimum(folder, values, MODEL, 2, 1) / "shards" / "mp_metadata_pp_rank_0.json"
        )
    else:
        tag = foreign.nxd(folder, values, MODEL, xser=True)
        rank = tag / "model" / "dp_rank_00_tp_rank_00_pp_rank_00.pt"
        path = {
            "rank": rank,
            "tensor": rank.with_name(rank.name + ".tensors") / "tensor_3.pt",
            "info": rank.with_name(rank.name + ".info.pt"),
            "tokenizer": tag / "tokenizer.json",
        }[what]
    path.unlink(missing_ok=True)
    path.symlink_to(watched.secret / "key")
    if what == "tokenizer":  # is none of the model: it is left where it is
        assert run_main(import_main, [str(arg) for arg in argv_of(folder)]) == 0
        assert not (tmp_path / "out" / "tokenizer.json").exists()
        return
    assert "is a link out of its folder" in watched.read(*argv_of(folder))


def test_integers_are_no_weights(tmp_path: Path) -> None:
    folder = meta_folder(tmp_path)
    path = folder / "consolidated.00.pth"
    held = torch.load(path)
    held["norm.weight"] = held["norm.weight"].long()
    torch.save(held, path)
    with pytest.raises(
        LlamaxError, match=r"model.norm.weight \(weight\) is torch.int64; llamax reads"
    ):
        import_main([str(arg) for arg in argv_of(folder)])
