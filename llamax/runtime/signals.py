"""SIGTERM and SIGUSR1 ask a run to save and stop; handlers are installed before torch is imported.

::

    imports, opening files       nothing to lose        the process ends at once
    the first step               it may compile long    the process ends after COMPILE_GRACE_S
    every later step             the request enters the step's all-reduce as a number, so that all
                                 ranks see it together: they save after the same step and end

In each case the exit code is that of ``errors.Stopped``.  A second signal changes nothing.

Python runs handlers in the main thread between bytecodes, so a long call into C delays them.
Therefore a second thread reads what the C handler writes to a pipe (``signal.set_wakeup_fd``) and
ends the process where nothing is lost.  Standard library only.
"""

from __future__ import annotations

import os
import signal
import threading

from llamax.runtime.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
COMPILE_GRACE_S = 15.0

_first = ""  # the name of the first signal
_reports = True
_waiting = threading.Event()  # ranks wait for each other from here on
_stepped = threading.Event()  # a step is done: there is something to save


def install(reports: bool = True) -> None:
    """Handle the signals from now on; a program calls it first of all.

    A rank that does not report ends silently: when a launcher ends all ranks, one line is enough.
    """
    global _reports
    _reports = reports
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in SIGNALS:
        signal.signal(number, _note)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_listen, args=(reader,), name="llamax-signals", daemon=True).start()


def requested() -> str:
    """The name of the signal that asked this rank to stop; empty if there was none."""
    return _first


def hold() -> None:
    """From now on ranks stop together, because they are about to wait for each other."""
    _waiting.set()


def stepped() -> None:
    """From now on stopping means saving, because a step is done."""
    _stepped.set()


def rest() -> None:
    """Ignore further signals, so that the program ends with the exit code that it chose."""
    if signal.getsignal(SIGNALS[0]) is _note:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _note(number: int, frame: object) -> None:
    global _first
    _first = _first or signal.Signals(number).name


def _listen(reader: int) -> None:
    while True:
        for number in os.read(reader, 1):
            if number in SIGNALS:
                _note(number, None)
                if not _waiting.is_set():
                    _leave("before training began")
                elif not _stepped.wait(COMPILE_GRACE_S):
                    _leave("in the first step")


def _leave(when: str) -> None:
    line = f"llamax: stopped by {_first} {when}; nothing new to save: start again to go on\n"
    if _reports:
        os.write(2, line.encode())
    os._exit(Stopped.exit_code)
