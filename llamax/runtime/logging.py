"""The logger of the library: rank 0 reports everything, other ranks only what is wrong.

::

    llamax: resuming from runs/demo, after step 200   rank 0, from INFO
    llamax: [rank 3] cannot write heartbeats/rank-3   any other rank, from WARNING

A run keeps the messages of every rank, from INFO, and the error that ended it, in
``logs/JOB/rank-NNNNN.log``.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from llamax.runtime.errors import LlamaxError
from llamax.runtime.files import make_folder, same_file
from llamax.runtime.text import print_text, printable

logger = logging.getLogger("llamax")
CLEAR_LINE = "\r\x1b[K"


class _Stderr(logging.Handler):
    """A handler that writes to the stderr of the moment, which tests and progress bars replace."""

    def emit(self, record: logging.LogRecord) -> None:
        if self.level > logging.INFO and shows_bars(sys.stderr):
            sys.stderr.write(CLEAR_LINE)  # the bar of rank 0 may be there
        show_line(self.format(record), sys.stderr)


class _File(logging.FileHandler):
    """A log file that may fail to be written, without a complaint for every line."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding=self.encoding, opener=same_file)

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def show_line(text: str, stream: TextIO) -> None:
    """Print a line, above the progress bars of this process.

    A full disk behind ``stream`` is ignored, for it must not end a run.
    """
    try:
        with bars_aside(stream):
            print_text(text, stream)
    except BrokenPipeError:
        raise
    except OSError:
        pass


_allowed = [True]  # whether this process may show bars: the innermost block of bars_allowed


@contextmanager
def bars_allowed(allowed: bool) -> Iterator[None]:
    """Inside the block long work is reported by lines of the log alone, unless ``allowed``."""
    _allowed.append(allowed)
    try:
        yield
    finally:
        _allowed.pop()


def shows_bars(stream: TextIO) -> bool:
    """Whether bars may be shown and ``stream`` is a terminal that can rewrite a line."""
    return _allowed[-1] and stream.isatty() and os.environ.get("TERM") != "dumb"


def bars_aside(stream: TextIO) -> AbstractContextManager[None]:
    """Clear the progress bars of tqdm inside the block, and draw them again after it."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if tqdm is None or not getattr(tqdm, "_instances", None):
        return nullcontext()
    aside: AbstractContextManager[None] = tqdm.external_write_mode(file=stream)
    return aside


def setup_logging(name: str = "", main: bool = True) -> None:
    """Send this process's messages to stderr: all if ``main``, else warnings behind ``[name]``.

    A second call replaces the first.
    """
    handler = _Stderr(logging.INFO if main else logging.WARNING)
    prefix = "" if main else f"[{name}] ".replace("%", "%%")
    handler.setFormatter(logging.Formatter(f"llamax: {prefix}%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


@contextmanager
def log_to_file(folder: Path, job: str, rank: int) -> Iterator[None]:
    """Write this rank's messages, and an error that leaves the block, to a file in ``folder``."""
    logs = folder / "logs" / job
    for place in (logs.parent, logs):
        make_folder(place)
    handler = _File(logs / f"rank-{rank:05d}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    except BaseException as error:
        if not isinstance(error, SystemExit):
            text = str(error)
            if isinstance(error, KeyboardInterrupt):
                text = "interrupted from the keyboard"
            elif not isinstance(error, LlamaxError):
                text = "".join(traceback.format_exception(error))
            handler.handle(logging.makeLogRecord({"levelname": "ERROR", "msg": text}))
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()
