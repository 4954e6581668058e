"""Training on torch-xla with a planted mistake: the guard reports it once, with its cause."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("torch_xla", reason="needs torch-xla: `make test` runs this in .venv-xla")

import torch
from support import ranks
from support.tiny_run import config, make_dataset, write
from torch import Tensor

from llamax.data.loader import Batch, Batches
from llamax.model.llama import Llama
from llamax.optim.zero import Zero

STEPS = 3


# torch-xla sends a number that is multiplied with; one that fills a tensor is part of the program.
def number_in_the_loss(loss: Callable[..., Any]) -> Callable[..., Any]:
    numbers = itertools.count(1)

    def grows(self: Llama, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        total, count = loss(self, *arguments, **options)
        return total * torch.full_like(total, next(numbers)), count

    return grows


def number_in_the_update(step: Callable[..., Any]) -> Callable[..., Any]:
    numbers = itertools.count(1)
    return lambda self, lr, at, scale: step(self, lr, torch.full_like(at, next(numbers)), scale)


def read_in_the_step(read: Callable[[Tensor], Any]) -> Callable[..., Any]:
    def plant(step: Callable[..., Any]) -> Callable[..., Any]:
        def reads(self: Zero, lr: Tensor, at: Tensor, scale: Tensor) -> Tensor:
            norm: Tensor = step(self, lr, at, scale)
            read(norm)
            return norm

        return reads

    return plant


def third_batch_is_short(step: Callable[..., Any]) -> Callable[..., Any]:
    numbers = itertools.count(1)

    def cut(self: Batches) -> list[Batch]:
        batches, length = step(self), 16 if next(numbers) == 3 else None
        return [
            Batch(*(None if part is None else part[:, :length] for part in batch))
            for batch in batches
        ]

    return cut


FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "a number in the loss": (Llama, "loss", number_in_the_loss),
    "a number in the update": (Zero, "step", number_in_the_update),
    "a copy": (Zero, "step", read_in_the_step(lambda norm: norm.cpu())),
    "an item": (Zero, "step", read_in_the_step(lambda norm: norm.item())),
    "a short batch": (Batches, "step", third_batch_is_short),
}


def trained(_: int, path: Path, fault: str) -> int:
    """The exit code of the training program with a fault in it."""
    from llamax.cli import train
    from llamax.runtime.process import run_main

    threading.current_thread().name = "rank 0"
    owner, name, plant = FAULTS[fault]
    with mock.patch.object(owner, name, plant(getattr(owner, name))):
        return run_main(train.main, ["--config", str(path)])


NUMBER = "because a Python number or state differs between steps"
READ = "because values are read on the host in the middle of the step"
SHORT = "because a batch is ids [4, 16], labels [4, 16], positions [4, 16], documents [4, 16] after"
MORE = "training compiled 1 program more than it needs, "


@pytest.mark.parametrize(
    ("fault", "answer", "code", "told"),
    [
        ("a number in the loss", "stop", 2, f"step 2: {MORE}{NUMBER}"),
        ("a number in the update", "warn", 0, f"step 2: {MORE}{NUMBER}"),
        ("a copy", "warn", 0, f"step 1: {MORE}{READ}"),
        ("an item", "warn", 2, "aten::_local_scalar_dense ran on the host in a step"),
        ("a short batch", "stop", 2, f"step 3: {MORE}{SHORT}"),
    ],
)
def test_a_late_program_is_reported_once_with_its_cause(
    tmp_path: Path, fault: str, answer: str, code: int, told: str
) -> None:
    cfg = config(make_dataset(tmp_path), tmp_path / "run", backend="xla", compile_guard=answer)
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, num_hidden_layers=1),
        data=dataclasses.replace(cfg.data, micro_batch=4),
        run=dataclasses.replace(cfg.run, steps=STEPS),
    )
    assert ranks.run(1, trained, write(cfg, tmp_path / "run.toml"), fault) == [code]
    (log,) = (tmp_path / "run/logs").glob("*/rank-00000.log")
    lines = [line for line in log.read_text().splitlines() if " INFO " not in line]
    assert len(lines) == 1, lines
    assert told in lines[0]
    assert ("run.compile_guard=warn goes on" in lines[0]) == (answer == "stop")
