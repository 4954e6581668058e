"""The runner of replicas reports those that stand still, and waits for those that are slow."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

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


def comes_late(rank: int, again: Path) -> list[float]:
    """A sum over two replicas; one starts too late for it, unless the file is there."""
    import torch
    import torch_xla
    import torch_xla.core.xla_model as xm
    import torch_xla.runtime as xr

    start = torch_xla._XLAC._xla_step_marker

    def late(*words: Any, **options: Any) -> None:
        if xr.global_ordinal() == 1:
            again.touch()
            time.sleep(20)
        start(*words, **options)

    if rank == 1 and not again.exists():
        torch_xla._XLAC._xla_step_marker = late
    total = xm.all_reduce("sum", torch.tensor([rank + 1.0]).to(torch_xla.device()))
    torch_xla.sync()
    return list(total.cpu().tolist())


def test_replicas_that_stand_still_are_reported_with_their_stacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranks, "STILL_S", 5.0)
    monkeypatch.setattr(ranks, "LEAST_S", 0.1)
    monkeypatch.setattr(ranks.shutil, "which", lambda name: None)  # gdb reads symbols for long
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


def test_replicas_start_again_where_the_client_gave_up_on_a_late_one(tmp_path: Path) -> None:
    assert ranks.run(2, comes_late, tmp_path / "again") == [[3.0], [3.0]]
    (tmp_path / "again").unlink()
    with pytest.raises(ranks.LateError, match=r"exit code -6\n(.|\n)*not all"):
        ranks._run(2, comes_late, (tmp_path / "again",), 1)
