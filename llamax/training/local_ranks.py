"""Ranks on this machine without torchrun, as ``llamax train --ranks 4`` starts them.

::

    parent ─┬─ rank 0    forked after the parent has imported torch, once for all ranks;
            ├─ rank 1    signals to the parent go to every rank; it ends when all ranks have
            └─ ...       ended, with their exit code

torchrun turns a signal, and every exit code of a rank but 0, into a traceback and code 1.  Here the
codes of ``llamax.runtime.errors`` stay, and no rank listens beyond the loopback interface.

Where a fork is not safe, on macOS, every rank is a new Python.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from llamax.parallel.network import free_port
from llamax.parallel.rendezvous import FAMILIES, LOOPBACK
from llamax.runtime import signals
from llamax.runtime.errors import Interrupted, Stopped
from llamax.runtime.process import run_main
from llamax.runtime.text import print_text

STOPPED = (Stopped.exit_code, Interrupted.exit_code)
ENDING_S = 60.0  # for the ranks that are left after one has failed
POLL_S = 0.1
PR_SET_PDEATHSIG = 1
Main = Callable[[Mapping[str, str]], int]
if sys.platform == "linux":
    START = multiprocessing.get_context("fork")
else:
    START = multiprocessing.get_context("spawn")


def rank_environment(environ: Mapping[str, str], ranks: int) -> list[dict[str, str]]:
    """The environment of each rank: ``environ`` with torchrun's variables of one machine."""
    launchers = {key for keys in FAMILIES.values() for key in keys}
    kept = {key: value for key, value in environ.items() if key not in launchers}
    found = [str(Path(__file__).parents[2]), *filter(None, [kept.get("PYTHONPATH")])]
    kept |= {
        "PYTHONPATH": os.pathsep.join(found),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(free_port(LOOPBACK)),
    }
    return [kept | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def run_ranks(main: Main, ranks: int, environ: Mapping[str, str]) -> int:
    """Run ``main(variables)`` on every rank, with its environment; return the exit code of the run.

    That is the code of the rank that failed first, or that of a stop which has saved, or 0.
    This process has imported what the ranks need, and has no other thread than that of ``signals``.
    """
    programs: list[BaseProcess] = []

    def send(number: int) -> None:
        for program in programs:
            if program.pid and program.exitcode is None:
                with suppress(ProcessLookupError):  # it ended as the signal came
                    os.kill(program.pid, number)

    signals.pass_on(send)
    try:
        for variables in rank_environment(environ, ranks):
            rank = START.Process(target=_run_rank, args=(main, variables))
            signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)  # the rank unblocks them
            rank.start()
            programs.append(rank)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)
        if early := signals.requested():  # it came while the ranks were started
            send(signal.Signals[early])
        return wait_for(programs)
    finally:
        for program in programs:
            program.kill()
            program.join()


def _run_rank(main: Main, variables: Mapping[str, str]) -> None:
    """The program of one rank, in a process of its own."""
    os.setsid()  # Ctrl-C reaches the parent alone, which passes it on
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)  # for programs that a rank starts
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # leave with the parent
    signals.install(variables["LOCAL_RANK"] == "0")
    sys.exit(run_main(lambda _: main(variables)))


class Program(Protocol):
    """A rank's program; ``exitcode`` is None while it runs, below 0 after a signal."""

    @property
    def exitcode(self) -> int | None: ...


def wait_for(programs: Sequence[Program], ending_s: float = ENDING_S) -> int:
    """Wait until all ranks have ended, or for ``ending_s`` after one has failed; the exit code.

    A line names the ranks that it waits for, after a tenth of that time.
    """
    failed, limit_s, silent = 0, float("inf"), True
    while None in [program.exitcode for program in programs] and time.monotonic() < limit_s:
        if failed := failed or _failure(programs):
            limit_s = min(limit_s, time.monotonic() + ending_s)
        if silent and time.monotonic() > limit_s - 0.9 * ending_s:
            silent = False
            _tell_left(programs, limit_s - time.monotonic())
        time.sleep(POLL_S)
    stopped = [code for code in STOPPED if code in [program.exitcode for program in programs]]
    return failed or _failure(programs) or max(stopped, default=0)


def _tell_left(programs: Sequence[Program], left_s: float) -> None:
    """Say which ranks have not ended, and how long they may still take [s]."""
    left = [str(rank) for rank, program in enumerate(programs) if program.exitcode is None]
    failed = next(rank for rank, program in enumerate(programs) if _has_failed(program))
    if left:
        ranks = f"rank {left[0]} has" if len(left) == 1 else f"ranks {', '.join(left)} have"
        why = f"after rank {failed} failed with exit code {exit_code(programs[failed])}"
        text = f"{ranks} not ended {why}, and will be killed in {left_s:.0f} s"
        print_text(f"llamax: {text}", sys.stderr)


def _has_failed(program: Program) -> bool:
    return program.exitcode not in (None, 0, *STOPPED)


def _failure(programs: Sequence[Program]) -> int:
    """The exit code of a rank that has failed, 0 if none has."""
    failed = [program for program in programs if _has_failed(program)]
    return (exit_code(failed[0]) or 0) if failed else 0


def exit_code(program: Program) -> int | None:
    """The exit code of a rank as a shell gives it; None while it runs."""
    code = program.exitcode
    return code if code is None or code >= 0 else 128 - code
