"""Folders of runs as training leaves them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from llamax.config.load import dump_config, load_config
from llamax.training.metrics import Record

NOW = 1_800_000_000.0

STEPS = 40


def record(step: int, **more: Any) -> Record:
    values: dict[str, Any] = {"seconds": step * 2.0, "step_s": 2.0, "loss": 5.0 - step / 20}
    values |= {"grad_norm": 0.5, "lr": 1e-3, "tokens_per_s": 512.0, "mfu": 0.4} | more
    tokens = {"consumed_tokens": step * 1024, "memory_bytes": 2**30}
    return Record(step=step, **tokens, **values)


def make_run(
    folder: Path, done: int, ranks: int = 0, silent: int = -1, left: str = "", *more: str
) -> Path:
    """A run's folder after ``done`` of 40 steps, written at NOW; ``more`` is set on top."""
    overrides = [f"--run.steps={STEPS}", f"--run.folder={folder}", "--optim.warmup_steps=2", *more]
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
