"""The training program on the cuda backend, with gloo and CPUs in the place of nccl and GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_run import config, forget, fork_ranks, hashes, log_of, make_dataset, write


def train(by: str, *words: str | Path) -> None:
    job = fork_ranks(2, *words, by=by)
    said = job.communicate()
    assert job.returncode == 0, said


@pytest.mark.parametrize("degree", ["--parallel.zero=3", "--parallel.tensor=2"])
def test_a_run_is_that_of_the_cpu_backend(tmp_path: Path, degree: str) -> None:
    """With the same bits, as sums of two ranks have one order; also where it goes on."""
    (tmp_path / "data").mkdir()
    dataset, found = make_dataset(tmp_path / "data"), []
    for backend, by in (("cpu", "fork_ranks"), ("cuda", "cuda_ranks")):
        folder = tmp_path / backend
        path = write(config(dataset, folder, backend=backend), tmp_path / f"{backend}.toml")
        train(by, "--config", path, degree)
        if backend == "cuda":
            forget(folder, 3)
            train(by, "--config", path, degree)
        found.append((log_of(folder), [*hashes(folder, 6).values()]))
    assert found[0] == found[1]
