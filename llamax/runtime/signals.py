"""Signals that ask a run to save and stop; handlers are installed before torch is imported.

SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal is gone) and SIGUSR1 have the same effect::

    imports, opening files       nothing to lose        the process ends at once
    the first step               it may compile long    the process ends after COMPILE_GRACE_S
    every later step             the request enters the step's all-reduce as a number, so that all
                                 ranks see it together: they save after the same step and end

In each case the exit code is that of ``errors.Stopped``, or of ``errors.Interrupted`` for SIGINT.
A SIGINT after an earlier signal ends the process at once; any other second signal changes nothing.
torchrun passes the second Ctrl-C on as SIGTERM, so that after a SIGINT this means the same there.
SIGINT and SIGHUP stay ignored if they are ignored at the start, as ``nohup`` and ``&`` have it.

Python runs handlers in the main thread between bytecodes, so a long call into C delays them.
Therefore a second thread reads what the C handler writes to a pipe (``signal.set_wakeup_fd``) and
ends the process where nothing is lost.  Standard library only.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llamax.runtime.errors import Interrupted, Stopped
from llamax.runtime.logging import logger

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP)
AGENT = "TORCHELASTIC_RESTART_COUNT"  # torchrun alone sets it
COMPILE_GRACE_S = 15.0
REPEAT_S = 0.3  # a SIGINT sooner after the first is its copy: some wrappers pass on what a rank got

_first = ""  # the name of the first signal
_reports = True
_handled: list[signal.Signals] = []
_listener: threading.Thread | None = None
_waiting = threading.Event()  # ranks wait for each other from here on
_stepped = threading.Event()  # a step is done: there is something to save


def install(reports: bool = True) -> None:
    """Handle the signals from now on; a program calls it first of all.

    A rank that does not report ends silently: when a launcher ends all ranks, one line is enough.
    """
    global _reports, _listener
    _reports = reports
    _handled.clear()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in SIGNALS:
        if number not in MAY_BE_IGNORED or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _note)
            _handled.append(number)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    _listener = threading.Thread(target=_listen, args=(reader,), name="llamax-signals", daemon=True)
    _listener.start()


def requested() -> str:
    """The name of the signal that asked this rank to stop; empty if there was none."""
    return _first


def reason() -> type[Stopped]:
    """The error of a run that stops now, by the signal to this rank or to another one."""
    return Interrupted if _first == signal.SIGINT.name else Stopped


def hold() -> None:
    """From now on ranks stop together, because they are about to wait for each other."""
    _waiting.set()


def stepped() -> None:
    """From now on stopping means saving, because a step is done."""
    _stepped.set()


def rest() -> None:
    """Ignore further signals, so that the program ends with the exit code that it chose."""
    for number in _handled:
        signal.signal(number, signal.SIG_IGN)


def pass_on(send: Callable[[int], None]) -> None:
    """Give every signal to ``send`` from now on, in a program that runs the ranks as children.

    The thread that listened ends, because a process that forks should have no other thread.
    """

    def handle(number: int, frame: object) -> None:
        _note(number, frame)
        send(number)

    writer = signal.set_wakeup_fd(-1)
    for number in _handled:
        signal.signal(number, handle)
    if _listener is not None:
        os.close(writer)
        _listener.join()


def aftermath() -> str:
    """What torchrun does after a signal, as the end of a line that says what a run has saved."""
    if AGENT not in os.environ:
        return ""
    return ". torchrun now ends with code 1 and a traceback, as after any signal: ignore both"


@contextmanager
def borrowed() -> Iterator[None]:
    """Handle signals during a run inside a program that goes on; afterwards its handlers are back.

    Ctrl-C and the other signals ask the run to save and stop.  Before a step is done, and at a
    second time, they do what the program does with them: Ctrl-C raises KeyboardInterrupt.  Outside
    the main thread, where Python allows no handlers, and where they are ignored, nothing changes.
    """
    global _first
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS if main}
    before = {n: handler for n, handler in before.items() if handler is not signal.SIG_IGN}

    def note(number: int, frame: object) -> None:
        if _stepped.is_set() and not _first:
            _note(number, frame)
            return
        signal.signal(number, before[signal.Signals(number)] or signal.SIG_DFL)
        signal.raise_signal(number)

    events = [(event, event.is_set()) for event in (_waiting, _stepped)]
    first, _first = _first, ""
    for event, _ in events:
        event.clear()
    try:
        for number in before:
            signal.signal(number, note)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        for event, was_set in events:
            (event.set if was_set else event.clear)()
        _first = first


def _note(number: int, frame: object) -> None:
    global _first
    _first = _first or signal.Signals(number).name


def _listen(reader: int) -> None:
    first_s = 0.0
    limit_s: float | None = None
    while True:
        wait_s = None if limit_s is None else max(limit_s - time.monotonic(), 0.0)
        if not select.select([reader], [], [], wait_s)[0]:
            if not _stepped.is_set():
                _leave("in the first step; nothing new to save: start again to go on")
            limit_s = None
            continue
        arrived = os.read(reader, 1)
        if not arrived:  # ``pass_on`` has closed the other end
            return os.close(reader)
        for number in arrived:
            if number not in _handled:
                continue
            _note(number, None)
            now_s = time.monotonic()
            if not _waiting.is_set():
                _leave("before training began; nothing new to save: start again to go on")
            if not first_s:
                first_s = now_s
                _announce()
                if not _stepped.is_set():
                    limit_s = now_s + COMPILE_GRACE_S
            elif _ends_at_once(number) and now_s > first_s + REPEAT_S:
                _leave("and by Ctrl-C at once, without saving; earlier checkpoints stay", True)


def _ends_at_once(number: int) -> bool:
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    by_torchrun = under_torchrun and number == signal.SIGTERM and _first == signal.SIGINT.name
    return number == signal.SIGINT or by_torchrun


def _announce() -> None:
    again = "; Ctrl-C again ends it at once" if _first == signal.SIGINT.name else ""
    if _stepped.is_set():
        logger.info("%s: the run saves after this step and ends%s", _first, again)
    else:
        logger.info(
            "%s: the run ends after its first step, or in %.0f s%s", _first, COMPILE_GRACE_S, again
        )


def _leave(when: str, at_once: bool = False) -> None:
    line = f"llamax: stopped by {_first} {when}{aftermath()}\n"
    if _reports:
        os.write(2, line.encode())
    os._exit(Interrupted.exit_code if at_once else reason().exit_code)
