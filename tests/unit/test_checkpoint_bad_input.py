"""Damaged and foreign checkpoints: each is refused with one line that names the thing."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import support.checkpoints as worlds
import torch
from safetensors.torch import save_file

from llamax.checkpoint import Checkpoint, check_shapes, find, load_owned, load_weights
from llamax.checkpoint.hf_folder import HubFolder
from llamax.checkpoint.runs import Copy
from llamax.checkpoint.safetensors_io import Entry, read, read_header
from llamax.runtime.errors import CheckpointError

MODEL = worlds.llama()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        ranks = worlds.world(MODEL, 2, 1, True, worlds.wholes(MODEL))
        worlds.save(folder, MODEL, ranks, step)
    return folder


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    """Step 2 of a run that holds an intact step 1 as well."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run" / "step-00000002"


def refused(match: str, act: Callable[[], Any]) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        act()
    assert "\n" not in str(caught.value)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


INTACT = "; the newest intact checkpoint is .*step-00000001"


def test_an_intact_one_is_not_refused(folder: Path) -> None:
    Checkpoint(folder).verify()
    worlds.load(Checkpoint(folder), worlds.world(MODEL, 2, 1, True, None))


def test_without_done(folder: Path) -> None:
    (folder / "done").unlink()
    refused("has no file 'done': saving it never finished" + INTACT, lambda: Checkpoint(folder))
    refused("has no file 'done'", lambda: Checkpoint(find(folder)))
    assert find(folder.parent) == folder.with_name("step-00000001")
    (folder.with_name("step-00000001") / "done").unlink()
    refused("holds no other that is intact", lambda: Checkpoint(folder))
    refused("no complete checkpoint in", lambda: find(folder.parent))
    refused("there is no checkpoint folder", lambda: find(folder / "nowhere"))


@pytest.mark.parametrize("share", [0, 1, 2, 3])
def test_one_flipped_bit_in_any_file(folder: Path, share: int) -> None:
    path = sorted(folder.glob("*.safetensors"))[share]
    expected = sha256(path.read_bytes()).hexdigest()
    flip(path, path.stat().st_size // 2)
    found = sha256(path.read_bytes()).hexdigest()
    line = rf"{path.name} changed .* its sha256 is {found}, the manifest says {expected}" + INTACT
    refused(line, lambda: Checkpoint(folder).verify())
    line = rf"{path.name} changed .* its bytes \d+ to \d+ is \w{{16}}, the manifest says \w{{16}}"
    for tp in (1, 2):
        ranks = worlds.world(MODEL, tp, 1, True, None)
        refused(line + INTACT, lambda ranks=ranks: worlds.load(Checkpoint(folder), ranks))
    Checkpoint(folder, verify=False).read("model.norm.weight")


def test_the_random_state_of_a_rank_that_is_no_more(folder: Path) -> None:
    path = folder / "optimizer-tp01-dp00.safetensors"
    flip(path, read_header(path)["rng"].offset + 7)
    number = [file.name for file in Checkpoint(folder).manifest.files].index(path.name)
    for share in range(3):
        if share == number % 3:
            refused(
                path.name + " changed .*" + INTACT,
                lambda: Checkpoint(folder).check_rng(number % 3, 3),
            )
        else:
            Checkpoint(folder).check_rng(share, 3)


def test_what_was_refused_is_refused_again(folder: Path) -> None:
    flip(folder / "weights-tp00-dp00.safetensors", -1)
    source, ranks = Checkpoint(folder), worlds.world(MODEL, 1, 1, True, None)
    for _ in range(2):
        refused("weights-tp00-dp00", lambda: worlds.load(source, ranks))


def test_a_configuration_that_changed_or_vanished(folder: Path) -> None:
    flip(folder / "config.toml", 1)
    refused("config.toml changed after it was saved.*" + INTACT, lambda: Checkpoint(folder))
    (folder / "config.toml").unlink()
    refused("cannot read .*config.toml: No such file" + ".*" + INTACT, lambda: Checkpoint(folder))


def test_a_header_that_is_damaged_is_refused_by_its_checksum(folder: Path) -> None:
    path = folder / "weights-tp00-dp00.safetensors"
    flip(path, 8)
    line = r"weights-tp00-dp00.safetensors changed .* the manifest says .*" + INTACT
    for verify in (True, False):
        refused(line, lambda verify=verify: Checkpoint(folder, verify).read("lm_head.weight"))


def test_weights_alone_do_not_wait_for_the_optimizer(folder: Path) -> None:
    flip(folder / "optimizer-tp00-dp00.safetensors", -1)
    Checkpoint(folder).read("lm_head.weight")
    refused("optimizer-tp00", lambda: Checkpoint(folder).rng(0, 0))


def test_a_file_cut_short_or_missing(folder: Path) -> None:
    path = folder / "weights-tp01-dp00.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    refused(f"has {size - 1} bytes, {size} were saved" + INTACT, lambda: Checkpoint(folder))
    path.unlink()
    refused("weights-tp01-dp00.safetensors is missing" + INTACT, lambda: Checkpoint(folder))
    shutil.copy(folder / "weights-tp00-dp00.safetensors", folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")
    refused("is a link out of its folder", lambda: Checkpoint(folder))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A manifest changed by someone who fixed ``done`` as well."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    text = json.dumps(manifest)
    (folder / "manifest.json").write_text(text)
    (folder / "done").write_text(sha256(text.encode()).hexdigest())


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("has format 1, this llamax .* reads 2", lambda m: m.update(format=1, files={})),
        (
            r"has 1 checksums for its \d\d blocks" + INTACT,
            lambda m: m["files"][0].update(sums="0" * 16),
        ),
        (r"dp00.safetensors has no checksums", lambda m: m["files"][0].update(sums="0" * 15)),
        (r"dp00.safetensors has no checksums", lambda m: m["files"][1].update(sums="\n" * 16)),
        (r"dp00.safetensors has no checksums", lambda m: m["files"][0].update(sha256="0\n")),
        ("config.toml has no checksum", lambda m: m.update(config_sha256="\n" * 64)),
        (r"'a\\nb' is no name of a tensor", lambda m: m["tensors"].update({"a\nb": whole(m)})),
        (r"tensors.a\\nb.shape: Field required", lambda m: m["tensors"].update({"a\nb": {}})),
        ("holds step 400; rename it to step-00000400", lambda m: m.update(step=400)),
        ("step -1 is below 0", lambda m: m.update(step=-1)),
        (r"step: Field required", lambda m: m.pop("step")),
        ("no name of a checkpoint's file", lambda m: m["files"][0].update(name="../../etc/passwd")),
        ("has shape", lambda m: m["tensors"]["lm_head.weight"].update(shape=[])),
        ("has shape", lambda m: m["tensors"]["lm_head.weight"].update(shape=[0, 24])),
        ("do not make", lambda m: m["tensors"]["lm_head.weight"].update(shape=[38, 24])),
        ("has dtype F8", lambda m: kept(m).update(dtype="F8")),
        ("not listed", lambda m: kept(m)["runs"][0].__setitem__(0, 99)),
        ("not listed", lambda m: kept(m)["runs"][0].__setitem__(0, -1)),
        ("do not make", lambda m: kept(m)["runs"].pop()),
        ("do not make", lambda m: kept(m)["runs"][0].__setitem__(2, 0)),
        ("does not hold", lambda m: kept(m).update(dtype="F16")),
        ("does not hold", lambda m: kept(m)["runs"][0].__setitem__(0, 1)),
    ],
)
def test_a_broken_manifest(
    folder: Path, match: str, change: Callable[[dict[str, Any]], object]
) -> None:
    rewrite(folder, change)
    refused(match, lambda: Checkpoint(folder).read("lm_head.weight"))


def whole(manifest: dict[str, Any]) -> Any:
    return manifest["tensors"]["lm_head.weight"]


def kept(manifest: dict[str, Any]) -> Any:
    return whole(manifest)["kinds"]["weight"]


def test_a_manifest_that_changed_or_vanished(folder: Path) -> None:
    flip(folder / "manifest.json", 100)
    refused("manifest.json changed after it was saved.*" + INTACT, lambda: Checkpoint(folder))
    (folder / "manifest.json").unlink()
    refused("cannot read .*manifest.json: No such file", lambda: Checkpoint(folder))


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
        ("not JSON", b"[" * 100_000, None),
        ("not a JSON object", b"[]", None),
        ("entry of a is malformed", b'{"a": 3}', None),
        ("entry of a is malformed", one(extent=(0,)), None),
        ("has dtype F8_E4M3", one(dtype="F8_E4M3"), None),
        (r"has dtype \['F32'\]", one(dtype=["F32"]), None),
        ("has shape", one(shape=(-2,)), None),
        ("has shape", one(shape=("2",)), None),
        ("does not fit its 8 bytes", one(shape=(1 << 40, 1 << 40)), None),
        ("a hole or overlap at byte 8", one(b=json.loads(one())["a"]), None),
        ("a hole or overlap at byte 0", one(extent=(8, 16)), None),
        (r"end at byte \d+, the file has", one(shape=(1,), extent=(0, 4)), None),
    ],
)
def test_safetensors_headers(tmp_path: Path, match: str, text: bytes, length: int | None) -> None:
    path = header(tmp_path / "x.safetensors", text, bytes(8), length)
    refused(match, lambda: read_header(path))


def test_a_whole_container_is_read(tmp_path: Path) -> None:
    path = header(tmp_path / "x.safetensors", one(), bytes(8))
    assert read_header(path) == {"a": Entry(torch.float32, (2,), 8 + len(one()))}
    refused("cannot read .*nothing", lambda: read_header(tmp_path / "nothing"))
    into, copy = torch.zeros(4), Copy(1, 4, 0, 4, 0, 4)
    refused("ends at byte .*: cut short", lambda: read(path, 8 + len(one()), [copy], into))
    refused("cannot read .*nothing", lambda: read(tmp_path / "nothing", 0, [copy], into))


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("has no model.layers.2.*which the model has", {"num_hidden_layers": 3}),
        ("has model.layers.1.*which the model lacks", {"num_hidden_layers": 1}),
        (r"q_proj.weight is \[24, 24\], the model's is \[12, 24\]", {"num_attention_heads": 2}),
        (r"embed_tokens.weight is \[37, 24\], the model's is \[38, 24\]", {"vocab_size": 38}),
        (r"embed_tokens.weight is \[37, 24\], the model's is \[37, 48\]", {"hidden_size": 48}),
        ("has lm_head.weight, which the model lacks", {"tie_word_embeddings": True}),
    ],
)
def test_another_model(folder: Path, match: str, change: dict[str, Any]) -> None:
    rank = worlds.world(replace(MODEL, **change), 1, 1, True, None)[0]
    source = Checkpoint(folder)
    refused(match, lambda: load_weights(source, rank.parameters, rank.shards))
    refused(match, lambda: check_shapes(source, rank.parameters, rank.shards))


def test_owned_runs_of_another_model(folder: Path) -> None:
    for change, match in (
        ({"num_hidden_layers": 3}, "has no model.layers.2"),
        ({"vocab_size": 38}, r"embed_tokens.weight is \[37, 24\], the model's is \[38, 24\]"),
        ({"hidden_size": 48}, "the model's has more"),
    ):
        rank = worlds.world(replace(MODEL, **change), 1, 1, True, None)[0]
        refused(match, lambda rank=rank: load_owned(Checkpoint(folder), rank.owned, rank.shards))


def test_rounding_is_refused_unless_asked_for(folder: Path) -> None:
    rank = worlds.world(MODEL, 1, 1, True, None, torch.bfloat16)[0]
    source = Checkpoint(folder)
    refused(
        r"is float32; taking it as bfloat16 would round",
        lambda: load_weights(source, rank.parameters, rank.shards),
    )
    load_weights(source, rank.parameters, rank.shards, convert=True)
    wanted = worlds.wholes(MODEL)["model.norm.weight", "weight"].bfloat16()
    assert torch.equal(rank.parameters["model.norm.weight"], wanted)


def test_float32_takes_masters_and_narrow_weights_widen(tmp_path: Path) -> None:
    values = worlds.wholes(MODEL, torch.bfloat16)
    ranks = worlds.world(MODEL, 2, 1, True, values, torch.bfloat16)
    narrow = Checkpoint(worlds.save(tmp_path, MODEL, ranks))
    rank = worlds.world(MODEL, 1, 1, True, None)[0]
    worlds.load(narrow, [rank])
    assert torch.equal(rank.parameters["model.norm.weight"], values["model.norm.weight", "master"])
    back = worlds.world(MODEL, 1, 1, True, None, torch.bfloat16)[0]
    masters = [run for run in back.owned if run.kind == "master"]
    wide = worlds.save(tmp_path / "wide", MODEL, [rank])
    load_owned(Checkpoint(wide), masters, back.shards)
    assert torch.equal(
        back.shares["master"]["model.norm.weight"], values["model.norm.weight", "master"]
    )


def hub(folder: Path, **change: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"model_type": "llama", "tie_word_embeddings": False, **change}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": torch.zeros(2, 2), "lm_head.weight": torch.ones(2, 2)}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_hub_folders(tmp_path: Path) -> None:
    embedding = "model.embed_tokens.weight"
    assert sorted(HubFolder(hub(tmp_path / "a")).names()) == ["lm_head.weight", embedding]
    assert HubFolder(hub(tmp_path / "b", tie_word_embeddings=True)).names() == [embedding]
    refused("holds a 'mistral' model", lambda: HubFolder(hub(tmp_path / "c", model_type="mistral")))
    refused("there is no folder", lambda: HubFolder(tmp_path / "nowhere"))

    folder = hub(tmp_path / "d")
    for text, match in (("[]", "not a JSON object"), ("{", "is not JSON")):
        (folder / "config.json").write_text(text)
        refused(match, lambda folder=folder: HubFolder(folder))
    with open(folder / "config.json", "wb") as file:
        file.truncate(65 << 20)
    refused("is over 64 MiB", lambda: HubFolder(folder))
    (folder / "config.json").unlink()
    refused("has no config.json: it is no Hugging Face", lambda: HubFolder(folder))


def test_hub_weights_from_outside_the_folder(tmp_path: Path) -> None:
    folder = hub(tmp_path / "a")
    os.rename(folder / "model.safetensors", tmp_path / "real")
    refused("has no weights; model.safetensors or", lambda: HubFolder(folder))
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused("has only pytorch_model.bin, a pickle", lambda: HubFolder(folder))
    (folder / "model.safetensors").symlink_to(tmp_path / "real")
    refused("is a link out of its folder", lambda: HubFolder(folder))
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    for name in ("../real", str(tmp_path / "real"), 3):
        index.write_text(json.dumps({"weight_map": {"model.embed_tokens.weight": name}}))
        refused("which is no file beside it", lambda: HubFolder(folder))
    index.write_text("{}")
    refused("has no weight_map", lambda: HubFolder(folder))
    save_file({"encoder.weight": torch.zeros(2)}, folder / "model.safetensors")
    refused("is not a LlamaForCausalLM", lambda: HubFolder(folder))
    save_file({"model.embed_tokens.weight": torch.zeros(2)}, folder / "model.safetensors")
    refused("has no lm_head.weight, and its config.json does not tie", lambda: HubFolder(folder))


def test_the_hubs_own_cache_is_made_of_links(tmp_path: Path) -> None:
    folder = tmp_path / "models--x--y" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    hub(folder)
    blobs = tmp_path / "models--x--y" / "blobs"
    blobs.mkdir()
    os.rename(folder / "model.safetensors", blobs / "abcd")
    (folder / "model.safetensors").symlink_to("../../blobs/abcd")
    assert HubFolder(folder).shape("lm_head.weight") == (2, 2)


def test_a_hub_folder_has_no_moments(tmp_path: Path) -> None:
    model = worlds.llama(layers=1)
    rank = worlds.world(model, 1, 1, True, worlds.wholes(model))[0]
    folder = hub(tmp_path / "a")
    tensors = {n: v for (n, k), v in worlds.wholes(model).items() if k == "weight"}
    save_file(tensors, folder / "model.safetensors")
    refused(
        "holds no exp_avg of model.* it has weights only",
        lambda: load_owned(HubFolder(folder), rank.owned, rank.shards),
    )
