"""The benchmark of traced graphs runs to its end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch_xla", reason="needs torch-xla: `make test` runs this in .venv-xla")

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "graphs.py"


def test_the_graphs_benchmark_counts_collectives_and_programs() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| microstep | all-gather | 15 |" in done.stdout
    assert "distinct programs of 4 ranks: 1 of each kind" in done.stdout
