"""SIGTERM and SIGUSR1 ask a run to save and stop; they are heard before torch is imported.

::

    imports, opening files       nothing to lose        the process ends at once
    the first step               it may compile long    ends after COMPILE_GRACE_S of waiting
    every later step             the wish enters the step's all-reduce as a number, so that all
                                 ranks learn of it together: they save after the same step and end

In each case the exit code is that of ``errors.Stopped``.  A second signal changes nothing.

Python runs its handlers in the main thread between bytecodes, which a long call into C keeps it
from.  So a thread of its own reads what the C handler writes to a pipe (``signal.set_wakeup_fd``)
and ends the process where nothing is lost by it.  Standard library only.
"""

from __future__ import annotations

import os
import signal
import threading

from llamax.runtime.errors import Stopped

HEARD = (signal.SIGTERM, signal.SIGUSR1)
COMPILE_GRACE_S = 15.0

_first = ""  # the name of the first signal
_speaks = True
_meeting = threading.Event()  # ranks wait for each other from here on
_stepping = threading.Event()  # a step is done: there is something to save


def install(speaks: bool = True) -> None:
    """Listen from now on; the first thing a program does.

    Ranks that do not speak end without a word: of those that a launcher ends together, as when
    another found a mistake, one tells.
    """
    global _speaks
    _speaks = speaks
    hear, tell = os.pipe()
    os.set_blocking(tell, False)
    for number in HEARD:
        signal.signal(number, _note)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)
    threading.Thread(target=_listen, args=(hear,), name="llamax-signals", daemon=True).start()


def requested() -> str:
    """The name of the signal that asked this rank to stop, or nothing."""
    return _first


def hold() -> None:
    """Ranks are about to wait for each other: from now on they stop together."""
    _meeting.set()


def stepped() -> None:
    """A step is done: from now on stopping means saving."""
    _stepping.set()


def rest() -> None:
    """The program is about to end, with its own exit code: nothing shall change that."""
    if signal.getsignal(HEARD[0]) is _note:
        for number in HEARD:
            signal.signal(number, signal.SIG_IGN)


def _note(number: int, frame: object) -> None:
    global _first
    _first = _first or signal.Signals(number).name


def _listen(hear: int) -> None:
    while True:
        for number in os.read(hear, 1):
            if number in HEARD:
                _note(number, None)
                if not _meeting.is_set():
                    _leave("before training began")
                elif not _stepping.wait(COMPILE_GRACE_S):
                    _leave("in the first step")


def _leave(when: str) -> None:
    line = f"llamax: stopped by {_first} {when}; nothing new to save: start again to go on\n"
    if _speaks:
        os.write(2, line.encode())
    os._exit(Stopped.exit_code)
