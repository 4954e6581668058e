"""Keeps the processes of mpirun alive until they have saved.

::

    start ── mpirun ── daemon ── rank ┊ keeper ── training program, or torchrun
      │  SIGUSR1          ┊  SIGTERM, and SIGKILL soon after
      └─ TERM, INT, HUP   └─ ends the left side of ┊ only

mpirun ends all processes when it gets SIGTERM and when one of them ends with an error.  Open MPI 4
waits for a second before SIGKILL, Open MPI 5 less, and no option of the latter changes that.  So
each process runs in a session of its own, under a keeper that outlives mpirun: the first signal to
stop becomes one SIGTERM to the process, which has the time to save.  What the process writes when
mpirun is gone goes into a file.

``start`` runs mpirun.  It turns its own signals into SIGUSR1, which mpirun forwards at once, then
waits for the keepers, which report in a folder on shared storage, and shows the files.  A report is
a file HOST-PID.process with ``began TIME``, later ``ended CODE``.

Sources: mpirun(1) of Open MPI 4.1 and 5.0, "Signal propagation"; prctl(2), PR_SET_PDEATHSIG.
Standard library and ``llamax.runtime`` only.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from llamax.runtime.errors import Interrupted, LinkError, LlamaxError, Stopped
from llamax.runtime.files import make_folder, refuse_link, same_file, write_atomic
from llamax.runtime.process import NO_PROCESS, process_state, wait_for_end
from llamax.runtime.text import print_text

ASKS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
HANDLED = (*ASKS, signal.SIGUSR2)
WAIT_S = 180.0  # for keepers of other machines, of which only the files are seen
PR_SET_PDEATHSIG = 1
BEGAN, ENDED = "began", "ended"  # in the report of a keeper, with its start or its exit code


def main(argv: Sequence[str]) -> int:
    """``start FOLDER COMMAND ..``, ``rank FOLDER COMMAND ..`` or ``node FOLDER COMMAND ..``."""
    role, folder, *command = argv
    try:
        if role == "start":
            return start(Path(folder), command)
        return supervise(Path(folder), command, group=role == "node")
    except LlamaxError as error:
        print_text(f"llamax: {error}", sys.stderr)
        return error.exit_code


def start(folder: Path, command: Sequence[str]) -> int:
    """Run mpirun until all that it started has ended; the exit code of the job."""
    make_folder(folder)
    for old in [*folder.glob("*.process"), *folder.glob("*.log")]:
        refuse_link(old)
        old.unlink()
    asked: list[int] = []
    child: list[subprocess.Popen[bytes]] = []

    def ask(number: int, frame: object) -> None:
        if child and child[0].poll() is None and (not asked or number == signal.SIGINT):
            child[0].send_signal(signal.SIGUSR2 if asked else signal.SIGUSR1)
        asked.append(number)

    for number in ASKS:
        signal.signal(number, ask)
    child.append(
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    )
    if asked:
        child[0].send_signal(signal.SIGUSR1)
    code = wait_for_end(child[0].poll)
    codes = wait_for_keepers(folder)
    for lost in sorted(folder.glob("*.log")):
        with open(lost, errors="replace", opener=same_file) as file:
            for line in file:
                print_text(line, sys.stderr, end="")
    if code and Stopped.exit_code in codes and set(codes) <= {0, Stopped.exit_code}:
        by_keyboard = asked[:1] == [signal.SIGINT]
        return Interrupted.exit_code if by_keyboard else Stopped.exit_code
    return code if code >= 0 else 128 - code


def wait_for_keepers(folder: Path, wait_s: float = WAIT_S) -> list[int]:
    """The exit codes of the processes, when all of them have ended.

    A report counts as long as the keeper that began it lives, or ``wait_s`` where that cannot be
    seen: on other machines, or without the time when it began.
    """
    limit = time.monotonic() + wait_s
    host = socket.gethostname()
    while True:
        codes, running = [], 0
        for report in folder.glob("*.process"):
            machine, _, pid = report.stem.rpartition("-")
            state, _, number = _read_report(report).partition(" ")
            if not state:
                continue
            known = number.isascii() and number.isdigit() and len(number) < 20
            if state == ENDED and known:
                codes.append(int(number))
            elif machine != host or state != BEGAN or not known:
                running += time.monotonic() < limit
            else:
                running += _lives(pid, int(number))
        if not running:
            return codes
        time.sleep(0.2)


def _read_report(path: Path) -> str:
    """The text of a report; empty for a file of another user, a link or a special file."""
    try:
        with open(path, "rb", opener=same_file) as file:
            ours = os.geteuid() in (0, os.fstat(file.fileno()).st_uid)
            return file.read(100).decode(errors="replace") if ours else ""
    except (OSError, LinkError):
        return ""


def _lives(pid: str, began: int) -> bool:
    """Whether a process of this machine lives that began then; its id may be in use again."""
    try:
        return process_state(int(pid))[1] == began
    except NO_PROCESS:
        return False


def supervise(folder: Path, command: Sequence[str], group: bool) -> int:
    """Run a process under a keeper; its exit code.

    ``group``: signals go to the group of processes of ``command``, not to its first alone.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    _end_with_parent()
    parent = os.getpid()
    keeper = os.fork()
    if keeper == 0:
        os.setsid()
        code = 1
        try:
            code = keep(folder, command, parent, group)
        except LlamaxError as error:
            print_text(f"llamax: {error}", sys.stderr)
            code = error.exit_code
        finally:
            os._exit(code)
    _handle(lambda number: os.kill(keeper, number))

    def poll() -> int | None:
        pid, status = os.waitpid(keeper, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    return wait_for_end(poll)


def keep(folder: Path, command: Sequence[str], parent: int, group: bool) -> int:
    """The keeper: run the process, pass on what it writes, and report its end."""
    report = folder / f"{socket.gethostname()}-{os.getpid()}.process"
    make_folder(folder)
    write_atomic(report, f"{BEGAN} {process_state(os.getpid())[1]}".encode())
    _end_with_parent()
    if os.getppid() != parent:
        return Stopped.exit_code
    pipe = subprocess.PIPE
    child = subprocess.Popen(  # signals are blocked until it exists
        command,
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        start_new_session=True,
        preexec_fn=_begin,
    )
    asked = itertools.count()

    def ask(number: int) -> None:
        first, again = next(asked) == 0, number == signal.SIGUSR2  # a second one may come in here
        if first or again:
            send = signal.SIGINT if again else signal.SIGTERM
            with suppress(ProcessLookupError):
                os.killpg(child.pid, send) if group else child.send_signal(send)

    _handle(ask)
    relays = [
        threading.Thread(target=relay, args=(source.fileno(), to, report.with_suffix(".log")))
        for source, to in ((child.stdout, 1), (child.stderr, 2))
        if source
    ]
    for thread in relays:
        thread.daemon = True
        thread.start()
    code = wait_for_end(child.poll)
    for thread in relays:
        thread.join(5)  # a process that outlives its parent may hold the pipe
    code = code if code >= 0 else 128 - code
    write_atomic(report, f"{ENDED} {code}".encode())
    return code


def relay(source: int, target: int, lost: Path) -> None:
    """Copy from a pipe to a descriptor, or to a file when nobody reads the descriptor any more."""
    while text := os.read(source, 1 << 16):
        try:
            while text:
                text = text[os.write(target, text) :]
        except OSError:
            with open(lost, "ab", opener=same_file) as file:
                file.write(text)


def _handle(handler: Callable[[int], None]) -> None:
    """Handle the signals from now on, those that came before included."""
    for number in HANDLED:
        signal.signal(number, lambda number, frame: handler(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)


def _begin() -> None:
    """What the process of a keeper does before it becomes the command."""
    _end_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)


def _end_with_parent() -> None:
    """Let the kernel send SIGTERM to this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
