"""A run whose checkpoints do not fit the disk says so before its first step."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.mounts import Usage, lack, small_disk
from support.tiny_run import STEPS, config, make_dataset, torchrun, write

from llamax.checkpoint.manifest import RNG
from llamax.checkpoint.reader import Checkpoint
from llamax.checkpoint.safetensors_io import read_header
from llamax.config.schema import Config
from llamax.data.tokenizer.train import train_sentencepiece
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import NoRoom
from llamax.runtime.units import show_bytes
from llamax.tools.doctor import storage
from llamax.train import train

SetFree = Callable[[int], None]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> SetFree:
    """Set the free bytes that the file system reports."""

    def set_free(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**50, 0, size))

    return set_free


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with a tokenizer that a Hugging Face folder takes."""
    folder = tmp_path_factory.mktemp("data")
    texts = [f"def f{i}(x): return x + {i}" for i in range(99)]
    train_sentencepiece(texts, 300, folder / "t.model")
    return make_dataset(folder, (folder / "t.model").read_bytes())


@pytest.fixture
def tiny(dataset: Path, tmp_path: Path) -> Config:
    whole = config(dataset, tmp_path / "run")
    return replace(whole, model=replace(whole.model, vocab_size=300))


def changed(tiny: Config, **checkpoint: Any) -> Config:
    return replace(tiny, checkpoint=replace(tiny.checkpoint, **checkpoint))


@pytest.mark.parametrize("also_hf", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_step_without_room_for_a_checkpoint(
    tiny: Config, free: SetFree, dtype: str, also_hf: bool
) -> None:
    tiny = replace(tiny, run=replace(tiny.run, dtype=dtype))
    tiny = changed(tiny, keep=1, every=0, also_hf=also_hf)
    size, folder = storage.checkpoint_bytes(tiny), Path(tiny.run.folder)
    free(size - 1)
    line = (
        rf"^{folder / 'checkpoints'} has no room for a checkpoint of this run "
        rf"\({show_bytes(size)}\); "
        f"{show_bytes(size - 1)} is free: make room, or set run.folder to a folder on a larger "
        "disk$"
    )
    with pytest.raises(NoRoom, match=line):
        train(tiny, Rendezvous())
    assert not (folder / "metrics.jsonl").exists()
    free(size)
    train(tiny, Rendezvous())
    saved = folder / f"checkpoints/step-{STEPS:08d}"
    hub = [saved / "hub"] if also_hf else []
    headers = [read_header(path) for place in (saved, *hub) for path in place.glob("*.safetensors")]
    held = sum(
        math.prod(entry.shape) * entry.dtype.itemsize
        for header in headers
        for name, entry in header.items()
        if name != RNG
    )
    assert held == size
    Checkpoint(saved).verify()


def test_a_run_that_may_go_on_without_checkpoints_warns(
    tiny: Config, free: SetFree, caplog: pytest.LogCaptureFixture
) -> None:
    free(1000)
    tiny = changed(tiny, on_failure="continue")
    with caplog.at_level(logging.INFO, "llamax"):
        train(tiny, Rendezvous())
    (line,) = [r.getMessage() for r in caplog.records if "no room" in r.getMessage()]
    assert line.endswith("1000 B is free: training goes on without checkpoints")


@pytest.mark.parametrize(
    ("keep", "more", "remedy"),
    [
        (0, STEPS, "make room, or set checkpoint.keep (0 keeps all)"),
        (1, 2, "make room"),
        (2, 3, "make room, or lower checkpoint.keep=2"),
    ],
)
def test_a_later_checkpoint_that_will_not_fit_is_a_warning(
    tiny: Config,
    free: SetFree,
    caplog: pytest.LogCaptureFixture,
    keep: int,
    more: int,
    remedy: str,
) -> None:
    tiny, size = changed(tiny, keep=keep), storage.checkpoint_bytes(tiny)
    free(more * size - 1)
    with caplog.at_level(logging.INFO, "llamax"):
        train(tiny, Rendezvous())
    said = [r.getMessage() for r in caplog.records if "no room" in r.getMessage()]
    assert said == [
        f"{tiny.run.folder}/checkpoints has no room for the {more} checkpoints of "
        f"{show_bytes(size)} that will be there at the same time; "
        f"{show_bytes(more * size - 1)} is free: {remedy}"
    ]


def test_checkpoints_that_are_there_need_no_more_room(
    tiny: Config, free: SetFree, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that goes on with two of three checkpoints on the disk needs room for one."""
    tiny = changed(tiny, keep=2)
    half = replace(tiny, run=replace(tiny.run, steps=STEPS - 3))
    train(half, Rendezvous())
    free(storage.checkpoint_bytes(tiny))
    with caplog.at_level(logging.WARNING, "llamax"):
        train(tiny, Rendezvous())
    assert not [r for r in caplog.records if "no room" in r.getMessage()]
    free(0)
    train(tiny, Rendezvous())  # a finished run saves nothing


def test_free_space_that_is_not_reported_is_not_checked(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lack(monkeypatch, "report free space", tmp_path)
    train(tiny, Rendezvous())


def test_one_of_two_ranks_reports_a_small_disk(tiny: Config, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "128k"):
        small = replace(tiny, run=replace(tiny.run, folder=str(tmp_path / "disk/run")))
        process = torchrun(2, write(small, tmp_path / "run.toml"))
        _, stderr = process.communicate(timeout=300)
    ours = [line for line in stderr.splitlines() if "no room" in line]
    assert process.returncode != 0
    assert len(ours) == 1
    assert ours[0].startswith(
        f"llamax: {tmp_path}/disk/run/checkpoints has no room for a checkpoint"
    )
    assert "Traceback" not in stderr.partition("torch/distributed")[0]
