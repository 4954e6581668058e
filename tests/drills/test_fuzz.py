"""Every parser of files reads changed copies of sound files: a result, or one line of a mistake.

``make drills`` spends FUZZ_MINUTES (60) on all parsers together::

    FUZZ_MINUTES=10 .venv/bin/python -m pytest --full tests/drills/test_fuzz.py
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.fuzz_targets import TARGETS, Target

from llamax.runtime.errors import LlamaxError
from llamax.runtime.process import describe_refusal

SLOWEST_S = 60
EXAMPLES = 25  # of each parser, without --full


def seconds_of_each(full: bool) -> float:
    return float(os.environ.get("FUZZ_MINUTES", "60")) * 60 / len(TARGETS) if full else 0.0


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_changed_files(
    target: Target, tmp_path: Path, full: bool, report: Callable[[str], None]
) -> None:
    sound = tmp_path / "sound"
    sound.mkdir()
    target.make(sound)
    target.read(sound)  # what is not changed is read
    seed0 = int(time.time()) if full else 0
    ends, count, refused = time.monotonic() + seconds_of_each(full), 0, 0
    while count < EXAMPLES or time.monotonic() < ends:
        seed = seed0 * 1_000_000 + count
        folder = tmp_path / "changed"
        shutil.copytree(sound, folder)
        name = target.change(folder, random.Random(seed))
        try:
            with time_limit():
                target.read(folder)
        except BaseException as error:
            # an error of the file system, such as a name that is too long, is one line as well
            path_error = isinstance(error, OSError) and describe_refusal(error)
            if not isinstance(error, LlamaxError) and not path_error:
                kept = tmp_path / f"failed-{seed}"
                folder.rename(kept)
                lines = "".join(traceback.format_exception(error))[-4000:]
                pytest.fail(f"{name} of {kept}, seed {seed}:\n{lines}", pytrace=False)
            refused += 1
        shutil.rmtree(folder)
        count += 1
    report(f"fuzz {target.name}: {count} changed files, {refused} refused, no traceback")


@contextmanager
def time_limit() -> Iterator[None]:
    """TimeoutError after SLOWEST_S: a parser must not hang."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"took over {SLOWEST_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SLOWEST_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
