"""What drills share: one small dataset, and an end to what they started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import tiny_run
from support.training_jobs import Job


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """A drill that fails leaves no job behind."""
    yield
    while Job.started:
        Job.started.pop().kill()
