"""A warning that a run shows once, though every rank and every worker process has it."""

from __future__ import annotations

import logging
from functools import cache

_silent = [False]  # in a worker process


def warn_once_per_run(text: str) -> None:
    """Log what every rank notices: once a warning of rank 0, an info line of the other ranks."""
    logger = logging.getLogger("llamax")  # as llamax.runtime.logging has set it up
    others = any(handler.level > logging.INFO for handler in logger.handlers)
    if not _silent[-1]:
        _log_once(logging.INFO if others else logging.WARNING, text)


def leave_to_parent() -> None:
    """Show no more such warnings in this worker process: its parent has them too."""
    _silent.append(True)


@cache
def _log_once(level: int, text: str) -> None:
    """Log a line once per level: a parent that only notes it may fork the rank that shows it."""
    logging.getLogger("llamax").log(level, "%s", text)
