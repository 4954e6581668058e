"""One logger for the whole library; rank 0 speaks, the others only when something is wrong.

::

    llamax: resuming from runs/demo, after step 200   rank 0, from INFO
    llamax: [rank 3] cannot write heartbeats/rank-3   any other rank, from WARNING

A run keeps what every rank says, from INFO, and what ended it, in ``logs/JOB/rank-NNNNN.log``.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from llamax.runtime.errors import LlamaxError

logger = logging.getLogger("llamax")


class _Stderr(logging.Handler):
    """Writes to whatever stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        show_line(self.format(record), sys.stderr)


class _File(logging.FileHandler):
    """A file that nothing depends on: a full disk is not told of once per line."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def show_line(text: str, stream: TextIO) -> None:
    """Print a line; where a full disk is behind ``stream``, that must not end a run."""
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass


def setup_logging(who: str = "", main: bool = True) -> None:
    """Send this rank's messages to stderr: all as ``main``, else warnings behind ``[who]``.

    Calling it again replaces what an earlier call set.
    """
    handler = _Stderr(logging.INFO if main else logging.WARNING)
    prefix = "" if main else f"[{who}] ".replace("%", "%%")
    handler.setFormatter(logging.Formatter(f"llamax: {prefix}%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


@contextmanager
def log_to_file(folder: Path, job: str, rank: int) -> Iterator[None]:
    """Keep this rank's messages in the run's ``folder``, and the error that leaves the block."""
    place = folder / "logs" / job
    place.mkdir(parents=True, exist_ok=True)
    handler = _File(place / f"rank-{rank:05d}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    except BaseException as error:
        if not isinstance(error, SystemExit):
            mistake = isinstance(error, LlamaxError)
            told = str(error) if mistake else "".join(traceback.format_exception(error))
            handler.handle(logging.makeLogRecord({"levelname": "ERROR", "msg": told}))
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()
