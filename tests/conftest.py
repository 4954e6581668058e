"""What all tests share: the pool of ranks, the shared data, hypothesis without a clock."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import hypothesis
import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # tests are small, and several ranks share the machine

TESTS = Path(__file__).resolve().parent
from support.world import Worlds  # noqa: E402

hypothesis.settings.register_profile("llamax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("llamax")


DRILL = "drill"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="drills at their full counts")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ended = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    told = [property for report in ended for property in report.user_properties]
    if lines := [line for name, line in told if name == DRILL]:
        terminalreporter.section("drills")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """``tell(line)``: a drill's result, printed when all tests are done."""
    return partial(record_property, DRILL)


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether drills run at their full counts (``make drills``)."""
    chosen: bool = request.config.getoption("--full")
    return chosen


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """Each test draws the same numbers, whichever ran before it in its process."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="module")
def worlds() -> Iterator[Worlds]:
    """``worlds(n).run(fn, *args)``: fn on n gloo ranks, results in rank order.

    Of this module only, since the threads of gloo's groups are never quite idle.
    """
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
