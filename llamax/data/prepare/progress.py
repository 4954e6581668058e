"""What ``prepare`` reports while it works: a bar on a terminal, otherwise a line now and then.

Workers add the tokens that they make to a number in shared memory, so that a single long text is
seen to go on.  Whatever takes more than FIRST_S seconds says so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import SpawnContext
from typing import Any

from tqdm import tqdm

from llamax.runtime.logging import logger
from llamax.runtime.process import leave_with_parent

FIRST_S, LEAST_S, EVERY_S = 0.8, 0.3, 10.0

_shared: Any = None  # in a worker: the number of tokens that all of them made


def start_worker(shared: Any) -> None:
    """Begin a worker process, which counts its tokens in ``shared``."""
    global _shared
    leave_with_parent()
    _shared = shared


def count_tokens(number: int) -> None:
    """Count tokens that this worker made."""
    if _shared is not None:
        with _shared.get_lock():
            _shared.value += number


@contextmanager
def every_few_seconds(report: Callable[[], None], began: float) -> Iterator[None]:
    """Call ``report`` in a thread, FIRST_S after ``began`` and then every EVERY_S seconds."""
    done = threading.Event()

    def watch() -> None:
        wait = max(LEAST_S, FIRST_S - (time.perf_counter() - began))
        while not done.wait(wait):
            report()
            wait = EVERY_S

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def reported(stage: str, began: float) -> Iterator[None]:
    """Log what is being done, where that takes long; ``began``: when the program did."""
    with every_few_seconds(lambda: logger.info("%s", stage), began):
        yield


class Progress:
    """The progress of tokenizing ``total`` ``unit`` (B or rows) in ``parts`` parts.

    ``began``: when the program did, on time.perf_counter; None: now.
    """

    def __init__(self, total: int, unit: str, parts: int, began: float | None = None) -> None:
        self._bar = tqdm(total=total, unit=unit, unit_scale=True, disable=None, desc="tokenizing")
        self._parts, self._finished = parts, 0
        self._tokens, self._start = 0, time.perf_counter()
        self.shared: Any = None
        self._watch = every_few_seconds(self._log, self._start if began is None else began)

    def __enter__(self) -> Progress:
        self._watch.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._watch.__exit__(None, None, None)
        self._bar.close()

    def share(self, context: SpawnContext) -> None:
        """Count tokens in memory that is shared with workers."""
        self.shared = context.Value("q", 0)

    def count(self, number: int) -> None:
        """Count tokens that this process made."""
        self._tokens += number
        self._show()

    def finish(self, size: int) -> None:
        """Count a part of ``size`` as done."""
        self._finished += 1
        self._bar.update(size)
        self._show()

    def _line(self) -> str:
        tokens = self._tokens + (self.shared.value if self.shared is not None else 0)
        rate = tokens / (time.perf_counter() - self._start)
        return f"{tokens:,} tokens, {rate:,.0f} tokens/s"

    def _show(self) -> None:
        self._bar.set_postfix_str(self._line(), refresh=False)
        if self._parts == 1:
            self._bar.refresh()

    def _log(self) -> None:
        if self._bar.disable:
            done = f"part {self._finished + 1} of {self._parts}"
            logger.info("tokenizing: %s, %s", done, self._line())
        else:
            self._show()
            self._bar.refresh()
