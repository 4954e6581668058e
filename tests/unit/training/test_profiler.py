"""The profiled window: the configured steps, on rank 0, in files named after them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llamax.config.schema import RunConfig
from llamax.training import profiler
from llamax.training.profiler import Profiler


def steps(profile: Profiler, count: int) -> None:
    """Step n multiplies matrices of size n + 10."""
    for step in range(1, count + 1):
        profile.at(step)
        x = torch.ones(step + 10, step + 10)
        torch.mm(x, x)
    profile.stop()


def test_a_window_of_steps_is_recorded(tmp_path: Path) -> None:
    steps(Profiler(RunConfig(profile_at=2, profile_steps=2), tmp_path, 0), 5)
    (trace,) = (tmp_path / "profile").glob("*.json")
    assert trace.name == "rank-00000-steps-2-3.json"
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(event["name"] == "aten::mm" for event in events) == 2
    assert "aten::mm" in trace.with_suffix(".txt").read_text()


def test_a_window_that_the_run_ends_in_is_written_too(tmp_path: Path) -> None:
    steps(Profiler(RunConfig(profile_at=3, profile_steps=9), tmp_path, 0), 4)
    assert [path.suffix for path in sorted((tmp_path / "profile").iterdir())] == [".json", ".txt"]


def test_nothing_is_recorded_unless_asked_and_only_on_rank_0(tmp_path: Path) -> None:
    steps(Profiler(RunConfig(), tmp_path, 0), 3)
    steps(Profiler(RunConfig(profile_at=1), tmp_path, 1), 3)
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize(
    ("compiler", "hint"),
    [
        ("2.23.6484.0", "run neuron-profile view -d FOLDER (Neuron SDK 2.28)"),
        ("2.24.8799.0", "run neuron-explorer view -d FOLDER (Neuron SDK 2.29)"),
        ("2.99", "run neuron-explorer view -d FOLDER (Neuron SDK 2.33)"),
        (None, ""),
    ],
)
def test_the_log_names_the_profiler_of_the_installed_sdk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str | None, hint: str
) -> None:
    monkeypatch.setattr(profiler, "installed", {"neuronx-cc": compiler}.get)
    lines: list[str] = []
    monkeypatch.setattr(profiler.logger, "info", lambda text, *args: lines.append(text % args))
    steps(Profiler(RunConfig(profile_at=1), tmp_path, 0), 2)
    assert len(lines) == 1
    steps(Profiler(RunConfig(profile_at=1, backend="xla"), tmp_path, 0), 2)
    assert [line for line in lines if hint and line.endswith(hint)] == lines[2:]
    assert len(lines) == (3 if hint else 2)
