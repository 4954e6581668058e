"""A view that fills the terminal and reads keys; whatever ends it, the terminal is as before."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ENTER = "\x1b[?1049h\x1b[?25l"  # the terminal's second screen, without cursor
LEAVE = "\x1b[?25h\x1b[?1049l"
PIECE_S = 0.5  # the longest wait for keys after which signals are handled

ReadKeys = Callable[[float], str]


@contextmanager
def full_screen() -> Iterator[ReadKeys]:
    """The terminal's second screen on standard output, until the block ends.

    Yields a function that waits some seconds, or less if a key is pressed, and returns the keys;
    where standard input is no terminal it only waits.  SIGTERM and SIGHUP raise SystemExit with
    128 + their number, so that they leave the screen too; Ctrl-Z leaves it while stopped.
    """
    keys = _Keys()

    def enter() -> None:
        keys.enter()
        _write(ENTER)

    def leave() -> None:
        _write(LEAVE)
        keys.leave()

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    def stop(number: int, frame: object) -> None:
        leave()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)  # returns when the process is continued
        signal.signal(signal.SIGTSTP, stop)
        enter()

    actions: dict[signal.Signals, Any] = {
        signal.SIGTERM: end,
        signal.SIGHUP: end,
        signal.SIGTSTP: stop,
    }
    before: dict[signal.Signals, Any] = {}
    try:
        for number, action in actions.items():
            before[number] = signal.signal(number, action)
        enter()
        yield keys.read
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        leave()


class _Keys:
    """Standard input, without waiting for the end of a line and without echo."""

    def __init__(self) -> None:
        self.file = sys.stdin.fileno() if sys.stdin and sys.stdin.isatty() else -1
        self._before: list[Any] | None = None

    def enter(self) -> None:
        if self.file >= 0 and self._in_foreground():
            self._before = termios.tcgetattr(self.file)
            tty.setcbreak(self.file)

    def leave(self) -> None:
        if self._before is not None:
            termios.tcsetattr(self.file, termios.TCSADRAIN, self._before)
            self._before = None

    def read(self, timeout_s: float) -> str:
        """Keys, or nothing after ``timeout_s``.

        It waits in pieces: Python would handle a signal that comes between its last look at signals
        and a wait only after that wait.
        """
        ends = time.monotonic() + timeout_s
        while not self._ready(min(PIECE_S, max(0.0, ends - time.monotonic()))):
            if time.monotonic() >= ends:
                return ""
        pressed = os.read(self.file, 64)
        if not pressed:  # the end of the input: no key will come
            self.leave()
            self.file = -1
        return pressed.decode(errors="replace")

    def _ready(self, timeout_s: float) -> bool:
        """Whether a key is pressed within some seconds."""
        if self._before is None:
            time.sleep(timeout_s)
            return False
        return bool(select.select([self.file], [], [], timeout_s)[0])

    def _in_foreground(self) -> bool:
        """Whether this process may change the terminal without being stopped for it."""
        try:
            return os.tcgetpgrp(self.file) == os.getpgrp()
        except OSError:  # it is not the terminal that controls this process
            return True


def _write(codes: str) -> None:
    """Send codes to the terminal; one that is gone does not matter."""
    try:
        sys.stdout.write(codes)
        sys.stdout.flush()
    except OSError:
        pass
