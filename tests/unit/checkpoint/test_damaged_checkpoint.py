"""Damaged checkpoints: flipped bits, cut files, broken manifests, each refused in one line."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.checkpoints as worlds
from support.saving import refused
from xxhash import xxh3_64_hexdigest

from llamax.checkpoint import (
    Checkpoint,
    find_checkpoint,
    listing,
)
from llamax.checkpoint.checksums import BLOCK_BYTES
from llamax.checkpoint.safetensors_io import read_header

MODEL = worlds.llama()


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
    refused("has no file 'done'", lambda: Checkpoint(find_checkpoint(folder)))
    assert find_checkpoint(folder.parent) == folder.with_name("step-00000001")
    (folder.with_name("step-00000001") / "done").unlink()
    refused("holds no other intact checkpoint", lambda: Checkpoint(folder))
    refused("no complete checkpoint in", lambda: find_checkpoint(folder.parent))
    refused("there is no checkpoint folder", lambda: find_checkpoint(folder / "nowhere"))


def test_an_error_waits_for_no_long_search(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond some bytes the other checkpoints are not read as a whole, and the message says so."""
    (folder / "done").unlink()
    other = folder.with_name("step-00000001")
    size = sum(path.stat().st_size for path in other.glob("*.safetensors"))
    monkeypatch.setattr(listing, "SEARCH_BYTES", size)
    refused("the newest intact checkpoint is .*step-00000001$", lambda: Checkpoint(folder))
    monkeypatch.setattr(listing, "SEARCH_BYTES", size - 1)
    monkeypatch.setattr("llamax.checkpoint.verify.verify_files", None)
    line = "the newest other checkpoint with all its files is .*step-00000001; check their content"
    refused(f"has no file 'done': .*; {line}", lambda: Checkpoint(folder))
    next(other.glob("*.safetensors")).unlink()
    refused("holds no other intact checkpoint", lambda: Checkpoint(folder))


@pytest.mark.parametrize("share", [0, 1, 2, 3])
def test_one_flipped_bit_in_any_file(folder: Path, share: int) -> None:
    path = sorted(folder.glob("*.safetensors"))[share]
    at = path.stat().st_size // 2
    entry = max((e for e in read_header(path).values() if e.offset <= at), key=lambda e: e.offset)
    start, end = entry.offset, entry.offset + math.prod(entry.shape) * entry.dtype.itemsize
    assert end - start <= BLOCK_BYTES, "a tensor of one block"
    expected = xxh3_64_hexdigest(path.read_bytes()[start:end])
    flip(path, at)
    found = xxh3_64_hexdigest(path.read_bytes()[start:end])
    line = rf"{path.name} changed .* its bytes {start} to {end - 1} is {found}, .* says {expected}"
    refused(line + INTACT, lambda: Checkpoint(folder).verify())
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
    rows = np.fromfile(folder / "index.bin", "<i8", 5 * sum(k["runs"] for k in kinds(manifest)))
    runs, sums = rows.reshape(-1, 5).tolist(), (folder / "index.bin").read_bytes()[rows.nbytes :]
    for kind in kinds(manifest):
        kind["runs"], runs = runs[: kind["runs"]], runs[kind["runs"] :]
    for file in manifest["files"]:
        size = 8 * file["blocks"]
        file["sums"], sums = sums[:size].hex(), sums[size:]
    change(manifest)
    listed = [file for file in manifest["files"] if "sums" in file]
    index = b"".join(
        [np.array(kind["runs"], "<i8").tobytes() for kind in kinds(manifest)]
        + [bytes.fromhex(file["sums"]) for file in listed]
    )
    for kind in {id(kind): kind for kind in kinds(manifest)}.values():
        kind["runs"] = len(kind["runs"])
    for file in listed:
        file["blocks"] = len(file.pop("sums")) // 16
    manifest["index_sha256"] = sha256(index).hexdigest()
    (folder / "index.bin").write_bytes(index)
    write(folder, manifest)


def write(folder: Path, manifest: dict[str, Any]) -> None:
    text = json.dumps(manifest)
    (folder / "manifest.json").write_text(text)
    (folder / "done").write_text(sha256(text.encode()).hexdigest())


def kinds(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of all kinds of all tensors."""
    return [k for tensor in manifest["tensors"].values() for k in tensor.get("kinds", {}).values()]


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("has format 1, this llamax .* reads 4", lambda m: m.update(format=1, files={})),
        (
            r"has 1 checksums for its \d\d blocks" + INTACT,
            lambda m: m["files"][0].update(sums=m["files"][0]["sums"][:16]),
        ),
        (
            r"dp00.safetensors has an impossible header of -1 bytes",
            lambda m: m["files"][0].update(header_bytes=-1),
        ),
        (
            f"dp00.safetensors has an impossible header of {2**60} bytes",
            lambda m: m["files"][0].update(header_bytes=2**60, size_bytes=2**61),
        ),
        ("dp00.safetensors changed after", lambda m: m["files"][0].update(header_bytes=9)),
        ("dp00.safetensors changed after", lambda m: m["files"][0].update(sums="0" * 16)),
        ("config.toml has no valid checksum", lambda m: m.update(config_sha256="\n" * 64)),
        (r"'a\\nb' is not the name of a tensor", lambda m: m["tensors"].update({"a\nb": whole(m)})),
        (r"tensors.a\\nb.shape: Field required", lambda m: m["tensors"].update({"a\nb": {}})),
        ("holds step 400; rename it to step-00000400", lambda m: m.update(step=400)),
        ("step -1 is below 0", lambda m: m.update(step=-1)),
        (r"step: Field required", lambda m: m.pop("step")),
        (
            "is not the name of a checkpoint file",
            lambda m: m["files"][0].update(name="../../etc/passwd"),
        ),
        (
            r"do not cover its shape \[\] exactly once",
            lambda m: m["tensors"]["lm_head.weight"].update(shape=[]),
        ),
        (
            "has the impossible shape",
            lambda m: m["tensors"]["lm_head.weight"].update(shape=[0, 24]),
        ),
        (
            "do not cover its shape .* exactly once",
            lambda m: m["tensors"]["lm_head.weight"].update(shape=[38, 24]),
        ),
        ("has the unknown dtype F8", lambda m: kept(m).update(dtype="F8")),
        ("refers to a file that is not listed", lambda m: kept(m)["runs"][0].__setitem__(0, 99)),
        ("refers to a file that is not listed", lambda m: kept(m)["runs"][0].__setitem__(0, -1)),
        ("do not cover its shape .* exactly once", lambda m: kept(m)["runs"].pop()),
        ("do not cover its shape .* exactly once", lambda m: kept(m)["runs"][0].__setitem__(2, 0)),
        ("do not cover its shape .* exactly once", lambda m: kept(m)["runs"].reverse()),
        ("do not cover its shape .* exactly once", lambda m: kept(m)["runs"].clear()),
        (
            "do not cover its shape .* exactly once",
            lambda m: kept(m)["runs"].append(kept(m)["runs"][-1]),
        ),
        (
            "do not cover its shape .* exactly once",
            lambda m: kept(m)["runs"][0].__setitem__(4, 2**63 - 1),
        ),
        (
            "do not cover its shape .* exactly once",
            lambda m: m["tensors"]["lm_head.weight"].update(shape=[2**40, 2**40]),
        ),
        ("does not hold", lambda m: kept(m).update(dtype="F16")),
        ("does not hold", lambda m: kept(m)["runs"][0].__setitem__(0, 1)),
    ],
)
def test_a_broken_manifest(
    folder: Path, match: str, change: Callable[[dict[str, Any]], object]
) -> None:
    rewrite(folder, change)
    refused(match, lambda: Checkpoint(folder).read("lm_head.weight"))


def test_an_index_that_changed_or_vanished(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    runs, blocks = kept(manifest)["runs"], manifest["files"][0]["blocks"]
    size = (folder / "index.bin").stat().st_size
    kept(manifest)["runs"] = runs + 1
    write(folder, manifest)
    words = (
        rf"index.bin is broken: it has {size} bytes, and the manifest counts .* take {size + 40}"
    )
    refused(words + INTACT, lambda: Checkpoint(folder))
    kept(manifest)["runs"], manifest["files"][0]["blocks"] = runs, blocks - 1
    write(folder, manifest)
    refused(f"which take {size - 8}" + INTACT, lambda: Checkpoint(folder))
    manifest["files"][0]["blocks"] = -1
    write(folder, manifest)
    refused("counts fewer than 0 runs or blocks" + INTACT, lambda: Checkpoint(folder))
    manifest["files"][0]["blocks"] = blocks
    write(folder, manifest)
    Checkpoint(folder)
    flip(folder / "index.bin", -1)
    words = r"index.bin changed after it was saved: its sha256 is \w{64}, the manifest says \w{64}"
    refused(words + INTACT, lambda: Checkpoint(folder))
    os.truncate(folder / "index.bin", 2**42)  # a hole that would take hours to read
    refused(f"index.bin is broken: it has {2**42} bytes.*" + INTACT, lambda: Checkpoint(folder))
    (folder / "index.bin").unlink()
    refused("cannot read .*index.bin: No such file", lambda: Checkpoint(folder))


def whole(manifest: dict[str, Any]) -> Any:
    return manifest["tensors"]["lm_head.weight"]


def kept(manifest: dict[str, Any]) -> Any:
    return whole(manifest)["kinds"]["weight"]


def test_a_manifest_that_changed_or_vanished(folder: Path) -> None:
    flip(folder / "manifest.json", 100)
    refused("manifest.json changed after it was saved.*" + INTACT, lambda: Checkpoint(folder))
    (folder / "manifest.json").unlink()
    refused("cannot read .*manifest.json: No such file", lambda: Checkpoint(folder))
