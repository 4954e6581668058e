"""The runner of replicas reports those that stand still, and waits for those that are slow."""

from __future__ import annotations

import re
import threading
import time

import pytest

pytest.importorskip("torch_xla", reason="needs torch-xla: `make test` runs this in .venv-xla")

from support import ranks


def stands_still(rank: int) -> None:
    if rank == 1:
        threading.Event().wait()


def computes(rank: int, seconds: float) -> int:
    while time.thread_time() < seconds:
        pass
    return rank


def test_replicas_that_stand_still_are_reported_with_their_stacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranks, "STILL_S", 5.0)
    monkeypatch.setattr(ranks, "LEAST_S", 0.1)
    with pytest.raises(ranks.ReplicaError) as caught:
        ranks.run(2, stands_still)
    report = str(caught.value)
    assert "2 replicas stood still for 5 s" in report
    assert "in stands_still\n" in report.partition("\n")[2]
    assert re.search(r"^thread \d+ \(", report, re.MULTILINE), "where the kernel has each"


def test_replicas_that_compute_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "STILL_S", 2.0)
    monkeypatch.setattr(ranks, "LEAST_S", 0.01)
    assert ranks.run(1, computes, 2.5) == [0]
