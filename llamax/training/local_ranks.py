"""Ranks on this machine without torchrun, as ``llamax train --ranks 4`` starts them.

::

    parent ─┬─ rank 0   python -m llamax.train ...     signals to the parent go to every rank;
            ├─ rank 1                                   the parent ends when all ranks have ended,
            └─ ...                                      with their exit code

torchrun turns a signal, and every exit code of a rank but 0, into a traceback and code 1.  Here the
codes of ``llamax.runtime.errors`` stay, and no rank listens beyond the loopback interface.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from llamax.parallel.network import free_port
from llamax.parallel.rendezvous import FAMILIES, LOOPBACK
from llamax.runtime import signals
from llamax.runtime.errors import Interrupted, Stopped

STOPPED = (Stopped.exit_code, Interrupted.exit_code)
ENDING_S = 60.0  # for the ranks that are left after one has failed
POLL_S = 0.1
PR_SET_PDEATHSIG = 1


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


def run_ranks(words: Sequence[str], ranks: int, environ: Mapping[str, str]) -> int:
    """Run the training program with ``words`` on every rank; return the exit code of the run.

    That is the code of the rank that failed first, or that of a stop which has saved, or 0.
    """
    programs: list[subprocess.Popen[bytes]] = []

    def send(number: signal.Signals) -> None:
        for program in programs:
            with suppress(ProcessLookupError):
                program.send_signal(number)

    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def leave_with_parent() -> None:
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    signals.pass_on(send)
    try:
        for variables in rank_environment(environ, ranks):
            programs.append(
                subprocess.Popen(
                    [sys.executable, "-m", "llamax.train", *words],
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C reaches the parent alone, which passes it on
                    preexec_fn=leave_with_parent,
                )
            )
            if early := signals.requested():  # it came while the ranks were started
                programs[-1].send_signal(signal.Signals[early])
        return wait_for(programs)
    finally:
        for program in programs:
            if program.poll() is None:
                program.kill()
            program.wait()


def wait_for(programs: Sequence[subprocess.Popen[bytes]], ending_s: float = ENDING_S) -> int:
    """Wait until all ranks have ended, or for ``ending_s`` after one has failed; the exit code."""
    failed, limit_s = 0, float("inf")
    while None in [program.poll() for program in programs] and time.monotonic() < limit_s:
        if failed := failed or _failure(programs):
            limit_s = min(limit_s, time.monotonic() + ending_s)
        time.sleep(POLL_S)
    codes = {program.returncode for program in programs}
    return failed or _failure(programs) or max(codes.intersection(STOPPED), default=0)


def _failure(programs: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit code of a rank that has failed, 0 if none has."""
    codes = [program.returncode for program in programs]
    failed = [code for code in codes if code is not None and code not in (0, *STOPPED)]
    return (failed[0] if failed[0] > 0 else 128 - failed[0]) if failed else 0
