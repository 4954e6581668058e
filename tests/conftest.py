"""What all tests share: the pool of ranks, the shared data, hypothesis without a clock."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # tests are small, and several ranks share the machine

TESTS = Path(__file__).resolve().parent
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

from world import Worlds  # noqa: E402

hypothesis.settings.register_profile("llamax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("llamax")


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    """``worlds(n).run(fn, *args)``: fn on n gloo ranks, results in rank order."""
    pool = Worlds()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real corpora that lies beside the repository; skips where there is none."""
    folder = TESTS.parents[1] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no corpora at {folder}")
    return folder
