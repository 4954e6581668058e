"""The progress of tokenizing.

Workers add the tokens that they make to a number in shared memory, so that a single long text is
seen to go on.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from llamax.runtime import progress
from llamax.runtime.process import leave_with_parent
from llamax.runtime.units import count

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

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


class Progress(progress.Progress):
    """The progress of tokenizing ``total`` ``unit`` (B or row) in ``parts`` parts.

    ``began``: when the program did, on time.perf_counter; None: now.
    """

    def __init__(self, total: int, unit: str, parts: int, began: float | None = None) -> None:
        super().__init__("tokenizing", total, unit, began=began)
        self._parts, self._finished, self._tokens = parts, 0, 0
        self.shared: Any = None

    def share(self, context: BaseContext) -> None:
        """Count tokens in memory that is shared with workers."""
        self.shared = context.Value("q", 0)

    def count(self, number: int) -> None:
        """Count tokens that this process made."""
        self._tokens += number

    def finish(self, size: int) -> None:
        """Count a part of ``size`` as done."""
        self._finished += 1
        self.update(size)

    def detail(self) -> str:
        """The tokens made so far, and their rate."""
        tokens = self._tokens + (self.shared.value if self.shared is not None else 0)
        rate = tokens / max(time.perf_counter() - self._start, 1e-9)
        return f"{count(tokens, 'token')}, {rate:,.0f} tokens/s"

    def line(self) -> str:
        """The state as a line of a log."""
        return f"tokenizing: part {self._finished + 1} of {self._parts}, {self.detail()}"
