"""The numbers of a step reach the host in one fetch, which every reader shares."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_run import config, make_dataset
from torch import Tensor

from llamax.backends.torch_distributed import Cpu
from llamax.parallel.rendezvous import Rendezvous
from llamax.train import train
from llamax.training.early_stopping import EarlyStopping
from llamax.training.metrics import Record
from llamax.training.recorder import Recorder, Throughput
from llamax.training.step_check import StepCheck
from llamax.training.step_result import Step


class Counting:
    """A device that counts its fetches."""

    def __init__(self) -> None:
        self.fetched: list[int] = []

    def step_boundary(self) -> None: ...

    def fetch(self, tensors: Sequence[Tensor]) -> list[float]:
        self.fetched.append(len(tensors))
        return [float(tensor) for tensor in tensors]


class Kept:
    """A view that keeps records."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def write(self, record: Record) -> None:
        self.records.append(record)

    def close(self) -> None: ...


def step(device: Counting, number: int, loss: float, validation: float | None) -> Step:
    one = torch.tensor(1.0)
    made = Step(number, torch.tensor(loss), one, one, torch.tensor(0.0), device)
    if validation is not None:
        made.validation_loss = torch.tensor(validation)
    return made


def test_all_readers_of_a_step_share_one_fetch() -> None:
    device, view = Counting(), Kept()
    check, stopping = StepCheck(0, lambda number: []), EarlyStopping(2, {})
    with Recorder([view], Throughput(lambda: 7, 64, 6, 0.0), 0.0) as recorder:
        for number, validation in ((1, None), (2, 3.0), (3, 3.5)):
            made = step(device, number, number / 2, validation)
            check.add(made)
            recorder.took(1.0)
            if validation is not None:
                stopping.add(made)
            recorder.add(made, 64 * number, 1e-3)
    check.check()
    assert device.fetched == [4, 5, 5], "a validation loss comes with the numbers of its step"
    assert [record.loss for record in view.records] == [0.5, 1.0, 1.5]
    assert [record.validation_loss for record in view.records] == [None, 3.0, 3.5]
    assert (stopping.best, stopping.waited) == (3.0, 1)


def test_a_skipped_step_is_recorded_though_it_is_not_reported() -> None:
    device, view = Counting(), Kept()
    throughput, samples = Throughput(lambda: 7, 64, 6, 0.0), [[], [1], [2], [3], [4]]
    with Recorder([view], throughput, 0.0, lambda number: samples[number]) as recorder:
        for number, loss in ((1, 1.0), (2, float("inf")), (3, float("nan")), (4, 1.0)):
            recorder.took(float(number))
            recorder.add(step(device, number, loss, None), 64 * number, 1e-3, number % 3 == 0)
    records = [(record.step, record.skipped_samples, record.step_s) for record in view.records]
    assert records == [(2, [2], 1.5), (3, [3], 2.0)], "throughput is that since the last report"


def test_a_run_fetches_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With validation, early stopping, a best checkpoint and a save at every other step."""
    cfg = config(make_dataset(tmp_path), tmp_path / "run", patience=9)
    cfg = replace(cfg, checkpoint=replace(cfg.checkpoint, every=2, keep_best=True))
    fetched, fetch = [], Cpu.fetch

    def counted(self: Cpu, tensors: Sequence[Tensor]) -> list[float]:
        fetched.append(len(tensors))
        return fetch(self, tensors)

    monkeypatch.setattr(Cpu, "fetch", counted)
    train(cfg, Rendezvous())
    validated = [number % 2 == 0 for number in range(1, cfg.run.steps + 1)]
    assert fetched == [5 if valid else 4 for valid in validated]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert ["validation_loss" in json.loads(line) for line in lines] == validated
