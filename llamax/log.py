"""One logger for the whole library; rank 0 speaks, the others only when something is wrong.

::

    llamax: resumed at step 200                            rank 0, from INFO
    llamax: [pp0 dp0 cp0 tp3] 1 checkpoint is unreadable   any other rank, from WARNING
"""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("llamax")


class _Stderr(logging.Handler):
    """Writes to whatever stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def setup(coordinate: str = "", main: bool = True) -> None:
    """Send this rank's messages to stderr: all as ``main``, else warnings behind ``[coordinate]``.

    Calling it again replaces what an earlier call set.
    """
    handler = _Stderr()
    prefix = "" if main else f"[{coordinate}] ".replace("%", "%%")
    handler.setFormatter(logging.Formatter(f"llamax: {prefix}%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if main else logging.WARNING)
    logger.propagate = False
