"""Shared steps of checkpoint tests: a saver, one save, a refusal, a full disk."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import support.checkpoints as worlds
from llamax.checkpoint import Saver
from llamax.config.model import ModelConfig
from llamax.config.schema import CheckpointConfig
from llamax.runtime.errors import CheckpointError

MODEL = worlds.llama()


def refused(match: str, act: Callable[[], Any]) -> None:
    """Assert that ``act`` raises a CheckpointError of one line that matches."""
    with pytest.raises(CheckpointError, match=match) as caught:
        act()
    assert "\n" not in str(caught.value)


def saver(folder: Path, rank: worlds.Rank, **options: Any) -> Saver:
    """The saver of a rank."""
    timing = {"timeout_s": options.pop("timeout_s")} if "timeout_s" in options else {}
    return Saver(folder, rank.axes, rank.sharded, CheckpointConfig(**options), **timing)


def save_step(saver: Saver, rank: worlds.Rank, step: int, model: ModelConfig = MODEL) -> None:
    """Save what a rank holds as one step, without waiting for the end."""
    saver.save(step, rank.owned, {"seed": 3}, model.to_hub("float32"), "[run]\nsteps = 9\n")


def disk_full(*args: Any, **options: Any) -> Any:
    """Fail as a system call does where no space is left."""
    raise OSError(errno.ENOSPC, "No space left on device")


def saved(
    folder: Path, model: ModelConfig, dtype: torch.dtype = torch.float32, tp: int = 4
) -> Path:
    """A run folder with a checkpoint of step 3, saved from tp x 2 ranks; the checkpoint."""
    ranks = worlds.world(model, tp, 2, True, worlds.wholes(model, dtype), dtype)
    return worlds.save(folder / "checkpoints", model, ranks, 3)
