"""What all tests share: the pool of ranks, the shared data, hypothesis without a clock."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from support.world import Worlds

TESTS = Path(__file__).resolve().parent
# Variables of a launcher, a cluster or a user, which would change what programs do.
FOREIGN = re.compile(
    "(SLURM|OMPI|PMIX?|MPI|TORCHELASTIC|SM|NEURON|XLA|PJRT|GLOO|NCCL|HF|TRANSFORMERS|WANDB)_.*"
    "|(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|JOB_COMPLETION_INDEX|KUBERNETES_SERVICE_HOST"
    "|COLUMNS|LINES|NO_COLOR|FORCE_COLOR|GLIBC_TUNABLES"
)
for name in filter(FOREIGN.fullmatch, [*os.environ]):
    del os.environ[name]
os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded: here nothing may import it
os.environ["HF_HUB_OFFLINE"] = "1"  # tests/support/hub.py stands in for the Hub
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # where the stand-ins are
# Programs inherit ignored signals, as under nohup, and llamax leaves them ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

hypothesis.settings.register_profile(
    "llamax",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # the machine may be, at any time
)
hypothesis.settings.load_profile("llamax")


DRILL = "drill"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="drills at their full counts")
    parser.addoption("--write-golden", action="store_true", help="golden files written anew")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ended = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    properties = [item for report in ended for item in report.user_properties]
    if lines := [line for name, line in properties if name == DRILL]:
        terminalreporter.section("drills")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """``report(line)``: a line of a drill's result, printed when all tests have ended."""
    return partial(record_property, DRILL)


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether drills run at their full counts (``make drills``)."""
    chosen: bool = request.config.getoption("--full")
    return chosen


@pytest.fixture
def compare_golden(request: pytest.FixtureRequest) -> Callable[[Path, str], None]:
    """``compare_golden(path, text)``: the text is the reviewed file's (or becomes it, if asked)."""

    def compare(path: Path, text: str) -> None:
        if request.config.getoption("--write-golden"):
            path.write_text(text)
        assert text == path.read_text()

    return compare


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Each test draws the same numbers and logs alike, whichever ran before it in its process."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
    logger = logging.getLogger("llamax")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def worlds() -> Iterator[Worlds]:
    """``worlds(n).run(fn, *args)``: fn on n gloo ranks, results in rank order.

    The ranks end with the module, since the threads of gloo's groups are never quite idle.
    """
    from support.world import Worlds

    pool = Worlds()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real corpora beside the repository; the test is skipped without it."""
    folder = TESTS.parents[1] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no corpora at {folder}")
    return folder
