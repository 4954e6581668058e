"""The doctor on storage: shared folders, disk space, the compilation cache."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.hosts import host_with, levels

from llamax.config.load import load_config
from llamax.model import lora
from llamax.runtime.errors import BackendError
from llamax.tools.audit import compile_cache
from llamax.tools.audit.compile_cache import Note
from llamax.tools.doctor import Host, storage
from llamax.training.resolve import resolve

# ---- storage


def mounts(root: Path, kind: str, place: Path) -> Host:
    return host_with(root, proc__mounts=f"/dev/root / ext4 rw 0 0\nfs {place} {kind} rw 0 0\n")


def test_storage_is_shared_or_not(tmp_path: Path) -> None:
    folder = tmp_path / "fsx"
    folder.mkdir()
    assert levels(storage.check(Host(), tmp_path / "none", 4, 0)) == {"storage": "unknown"}
    lustre = mounts(tmp_path, "lustre", folder)
    assert storage.file_system(lustre, folder) == "lustre"
    assert storage.file_system(lustre, tmp_path) == "ext4"
    assert levels(storage.check(lustre, folder, 1, 0)) == {"storage": "ok", "file system": "ok"}
    assert levels(storage.check(lustre, folder, 2, 0)) == {
        "storage": "ok",
        "file system": "ok",
        "shared": "unknown",
    }
    private = mounts(tmp_path, "xfs", folder)
    assert levels(storage.check(private, folder, 2, 0))["storage"] == "error"
    if os.geteuid() != 0:
        folder.chmod(0o500)
        assert levels(storage.check(private, folder, 1, 0)) == {"storage": "error"}


@pytest.mark.parametrize(("ahead", "level"), [(0.0, "ok"), (30.0, "warning"), (-30.0, "warning")])
def test_nodes_meet_in_the_folder(tmp_path: Path, ahead: float, level: str) -> None:
    place = tmp_path / storage.BEACONS
    place.mkdir()
    told = {"node": "other", "time": time.time() + ahead}
    (place / "other.json").write_text(json.dumps(told))
    found = levels(storage._beacons(tmp_path, 2, 1.0, "me"))
    assert found == {"shared": "ok", "clock skew": level}
    (place / "other.json").write_text(json.dumps({"node": "other", "time": 0}))
    assert levels(storage._beacons(tmp_path, 2, 0.0, "me")) == {"shared": "unknown"}


def test_disk_and_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = load_config("demo", ["--run.steps=160", "--checkpoint.every=40", "--checkpoint.keep=0"])
    assert levels(storage.disk(tmp_path, resolve(small, 4), None)) == {"disk": "ok"}
    found = list(storage.disk(tmp_path, resolve(small, 4), 10.0))
    assert levels(found) == {"disk": "ok", "write rate": "ok"}
    assert found[0].what.startswith("4 checkpoints of 36.6 MiB")
    huge = load_config("llama3.1-70b", ["--run.dtype=float32"])
    assert levels(storage.disk(tmp_path, resolve(huge, 512), 10.0))["disk"] == "error"
    assert levels(storage.disk(tmp_path / "none", resolve(huge, 512), 10.0)) == {"disk": "unknown"}
    monkeypatch.setattr(storage, "_write_rate", lambda folder: 1e3)
    assert levels(storage.disk(tmp_path, resolve(small, 4), 0.1))["write rate"] == "warning"
    assert list(tmp_path.iterdir()) == []


def test_the_rate_of_saving_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["--run.steps=160", "--checkpoint.every=0", "--checkpoint.every_minutes=2"]
    by_time = resolve(load_config("demo", settings), 4)
    monkeypatch.setattr(storage, "_write_rate", lambda folder: 1e3)
    for step_s in (None, 10.0):  # which a clock does not depend on
        (found,) = (f for f in storage.disk(tmp_path, by_time, step_s) if f.name == "write rate")
        assert found.what.startswith("312 KiB/s needed")
        assert found.fix.startswith("raise checkpoint.every_minutes above 2, or")
    both = replace(by_time.config.checkpoint, every=5)
    for step_s, setting in ((20.0, "every above 5"), (30.0, "every_minutes above 2")):
        assert storage.save_interval(both, step_s)[0] == f"checkpoint.{setting}"


@pytest.mark.parametrize(
    ("keys", "fullest"),
    [
        ("every=0", 1),  # at the end alone
        ("every=160 keep_best=true", 1),
        ("every=100", 2),
        ("every=10", 3),
        ("every=10 keep=0", 16),
        ("every=10 keep=15", 16),
        ("every=10 keep=20", 16),
        ("every=10 keep_best=true", 4),
        ("every=10 keep_every=40", 6),
        ("every=10 keep_every=40 keep=13", 14),
        ("every=0 every_minutes=30", 3),  # as many as keep, and the one being written
        ("every=100 every_minutes=30 keep=4", 5),
        ("every=0 each_epoch=true", 3),
        ("every=0 each_epoch=true keep_best=true", 4),
    ],
)
def test_checkpoints_that_are_there_at_once(keys: str, fullest: int) -> None:
    settings = ["--run.steps=160", *(f"--checkpoint.{key}" for key in keys.split())]
    config = load_config("demo", settings)
    validating = replace(config, run=replace(config.run, validate_every=10))
    assert resolve(validating, 4).most_checkpoints == fullest


@pytest.mark.parametrize(("keep", "fullest"), [(1, 2), (2, 3), (3, 3), (0, 3)])
def test_checkpoints_of_epochs_that_are_there_at_once(keep: int, fullest: int) -> None:
    tuned = load_config("gsm8k-lora", [f"--checkpoint.keep={keep}"])
    assert resolve(tuned, 32).most_checkpoints == fullest
    often = replace(tuned.checkpoint, every=100, each_epoch=False)
    assert resolve(replace(tuned, checkpoint=often), 32).most_checkpoints == (
        keep + 1 if keep else 1
    )


def test_bytes_of_a_checkpoint() -> None:
    demo = load_config("demo", [])
    weights = demo.model.num_parameters()
    assert storage.checkpoint_bytes(demo) == weights * 12  # its weights are their own masters
    assert (
        storage.checkpoint_bytes(replace(demo, run=replace(demo.run, backend="xla")))
        == weights * 16
    )
    half = replace(demo, run=replace(demo.run, dtype="bfloat16"))
    assert storage.checkpoint_bytes(half) == weights * 14
    hub = replace(half, checkpoint=replace(half.checkpoint, also_hf=True))
    assert storage.checkpoint_bytes(hub) == weights * 16
    tuned = load_config("gsm8k-lora", [])
    assert storage.checkpoint_bytes(tuned) == 14 * lora.num_parameters(tuned.model, tuned.finetune)


def test_compile_cache(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    traced = {"microstep": "a1" * 32, "update": "b2" * 32}
    flags = {"NEURON_CC_FLAGS": "--model-type transformer"}
    note = Note(None, flags["NEURON_CC_FLAGS"])

    def cache(url: Path | str = folder, count: int = 1) -> tuple[str, str, str]:
        (found,) = storage.cache(str(url), count, lambda: traced, note)
        return found.level, found.what, found.fix

    def nowhere() -> dict[str, str]:
        raise BackendError("torch-xla is absent")

    assert cache("s3://bucket/cache")[0] == cache(folder / "deep")[0] == "unknown"
    assert cache()[0] == "warning"
    folder.mkdir()
    assert cache(count=2)[1] == f"no compiled programs in {folder}; the run has 2"
    module = folder / "neuronxcc-2.23" / "MODULE_1+2"
    module.mkdir(parents=True)
    level, _, fix = cache()
    assert (level, fix) == (
        "warning",
        f"cat {module}/*.log; then rm -r {module} and precompile again",
    )
    (module / "model.neff").touch()
    level, what, _ = cache(count=2)
    told = f"1 compiled program in {folder}"
    assert (level, what) == ("warning", f"{told}; the run has 2")
    assert cache()[:2] == ("unknown", f"{told}, without notes about their run")
    compile_cache.write_notes(folder, {"microstep": "a1" * 32}, flags)
    level, what, fix = cache()
    assert level == "warning"
    assert what == f"{told}, without update of this run: it changed since precompile"
    assert fix == storage.PRECOMPILE
    compile_cache.write_notes(folder, traced, flags)
    assert cache()[:2] == ("ok", f"{told}, with microstep, update of this run")
    (found,) = storage.cache(str(folder), 1, nowhere, note)
    assert (found.level, found.what) == ("unknown", f"{told}; torch-xla is absent")
    for other in (Note("2.24.1", note.flags), Note(None, "--optlevel=1")):  # these compile anew
        (found,) = storage.cache(str(folder), 1, lambda: traced, other)
        assert "without microstep and update of this run" in found.what
