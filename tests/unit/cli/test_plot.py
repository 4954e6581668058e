"""``llamax plot``: the names of runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llamax.runtime.errors import BackendError, DataError
from llamax.tools.monitor import plot
from llamax.training.metrics import (
    Record,
)


def test_runs_of_one_name_are_plotted_by_their_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(1, 8, 1.0, 0.1, 2.0, 1.0, 1e-3, 80.0, 0, 0.1)
    for each in ("a/run", "b/run", "c/other"):
        (tmp_path / each).mkdir(parents=True)
        (tmp_path / each / "metrics.jsonl").write_text(record.to_json() + "\n")
    monkeypatch.chdir(tmp_path)
    folders = [Path("a/run"), Path("b/run"), tmp_path / "c/other"]
    assert list(plot.read_runs(folders)) == ["a/run", "b/run", "other"]
    monkeypatch.chdir(tmp_path / "a" / "run")
    assert list(plot.read_runs([Path()])) == ["run"]


def test_a_run_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no records in metrics\.jsonl; give a run's folder"):
        plot.read_runs([tmp_path])


def test_drawing_without_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendError, match=r"pip install 'llamax\[plot\]'$"):
        plot.draw({}, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
