"""The lock of a run folder: its owner, and folders that cannot be locked."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from llamax.checkpoint import lock
from llamax.config.load import dump_config, load_config
from llamax.runtime.errors import (
    CheckpointError,
)
from llamax.tools.monitor.run_folder import read_run
from llamax.training.metrics import Record

# --- locks ---------------------------------------------------------------------------------------


def test_a_lock_names_its_owner_and_ends_with_it(tmp_path: Path) -> None:
    with lock.held(tmp_path / "run"):
        owner = rf"run is in use by pid {os.getpid()} on .* since "
        with pytest.raises(CheckpointError, match=owner), lock.held(tmp_path / "run", 0.2):
            pass
    with lock.held(tmp_path / "run", 0.0):
        pass
    child = os.fork()
    if child == 0:
        with lock.held(tmp_path / "run"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with lock.held(tmp_path / "run", 0.0):
        assert f"pid {os.getpid()}" in (tmp_path / "run" / "lock").read_text()


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("run", "link"):
        with (
            pytest.raises(CheckpointError, match=f"{name} is no folder; remove it or choose"),
            lock.held(tmp_path / name),
        ):
            pass


def test_a_folder_that_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("llamax").propagate = True
    codes = iter([errno.ENOLCK, errno.EIO])

    def cannot(*args: Any) -> None:
        raise OSError(next(codes), "No locks available")

    monkeypatch.setattr(fcntl, "flock", cannot)
    with lock.held(tmp_path):
        assert "cannot lock files" in caplog.text
    with pytest.raises(OSError, match="No locks"), lock.held(tmp_path):
        pass
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match=r"cannot write .*below/lock: Not a directory"),
        lock.held(tmp_path / "file" / "below"),
    ):
        pass


NOW = 1_800_000_000.0


STEPS = 40


def record(step: int, **more: float) -> Record:
    values: dict[str, float] = {"seconds": step * 2.0, "step_s": 2.0, "loss": 5.0 - step / 20}
    values |= {"grad_norm": 0.5, "lr": 1e-3, "tokens_per_s": 512.0, "mfu": 0.4} | more
    tokens = {"consumed_tokens": step * 1024, "memory_bytes": 2**30}
    return Record(step=step, **tokens, **values)  # type: ignore[arg-type]


def make(folder: Path, done: int, ranks: int = 0, silent: int = -1, left: str = "") -> Path:
    """A run's folder after ``done`` of 40 steps, written at NOW."""
    overrides = [f"--run.steps={STEPS}", f"--run.folder={folder}", "--optim.warmup_steps=2"]
    folder.mkdir(parents=True)
    text = dump_config(load_config("demo", overrides))
    (folder / "config.toml").write_text(text)
    metrics = folder / "metrics.jsonl"
    lines = [record(s, validation_loss=4.0) if s == 8 else record(s) for s in range(1, done + 1)]
    metrics.write_text("".join(f"{each.to_json()}\n" for each in lines))
    os.utime(metrics, (NOW, NOW))
    (folder / "heartbeats").mkdir()
    for rank in range(ranks):
        path = folder / "heartbeats" / f"rank-{rank:05d}"
        beat = {"beat": 3, "step": done, "host": f"node{rank // 2}", "pid": 1, "left": left}
        path.write_text(json.dumps(beat).ljust(512))
        age = 100 if rank == silent else 1
        os.utime(path, (NOW - age, NOW - age))
    step = folder / "checkpoints" / "step-00000008"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text("{}")
    (step / "done").touch()
    for other in ("step-00000016", "step-00000017.tmp", "step-00000018.past"):
        (step.parent / other).mkdir()
        (step.parent / other / "manifest.json").write_text("{}")
    (step.parent / "step-00000018.past" / "done").touch()
    told = {"ranks": 4, "dollars_per_hour": 36.0, "instance": "trn1.32xlarge"}
    (folder / "environment.json").write_text(json.dumps(told))
    return folder


def test_a_lock_tells_whether_a_run_of_this_machine_lives(tmp_path: Path) -> None:
    folder = make(tmp_path / "r", 12)
    with lock.held(folder):
        assert read_run(folder, NOW + 9999).state == "running"
    assert read_run(folder, NOW + 5).state == "stopped"
    (folder / "lock").write_text("pid 1 on elsewhere since then\n")
    assert read_run(folder, NOW + 5).state == "running"
    assert read_run(folder, NOW + 9999).state == "dead"
