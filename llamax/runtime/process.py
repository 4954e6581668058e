"""The wrapper of every program, and settings of processes.

``run_main`` is the one place where an error becomes a line on stderr, ``llamax: message``, and an
exit code; ``llamax.runtime.errors`` lists the codes.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llamax.runtime.cores import limit_threads
from llamax.runtime.errors import Interrupted, LlamaxError, NoRoom, Terminated
from llamax.runtime.files import NO_ROOM
from llamax.runtime.signals import SIGNALS
from llamax.runtime.text import print_text, printable_line
from llamax.runtime.warn import leave_to_parent

PROC_SELF = Path("/proc/self/stat")  # absent on macOS
LONGEST = 5000  # characters of a line of an error; a value from a file may be of any length
POLL_S = 0.05  # the longest that the end of a child process, or a signal, goes unnoticed
NO_CACHE = "glibc.malloc.tcache_count=0"

# Errors of a path that the user can correct; a missing file, in contrast, is a defect of llamax.
REFUSALS = (
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)
# Operations that a file system does not have.
UNSUPPORTED = (errno.EINVAL, errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV)
# A file system, or a device, that fails or is gone.
FAILURES = (
    errno.EBUSY,
    errno.EIO,
    errno.ENOTCONN,
    errno.EREMOTEIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
)
# Those that an open file, which has no name here, may raise.
UNNAMED = (errno.EIO, errno.ENOSYS, errno.EOPNOTSUPP, errno.EREMOTEIO, errno.ESTALE)

Main = Callable[[Sequence[str]], int]


def run_main(main: Main, argv: Sequence[str] | None = None) -> int:
    """Run ``main(argv)`` and return the exit code; None stands for the command line."""
    limit_threads()
    try:
        code = main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except (LlamaxError, Terminated) as error:
        _print_error(str(error))
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno in NO_ROOM:
            where = f" for {error.filename}" if error.filename else ""
            _print_error(f"no room{where}: {error.strerror}; make some")
            return NoRoom.exit_code
        text = describe_refusal(error)
        if text is None:
            raise
        _print_error(text)
        return LlamaxError.exit_code
    except KeyboardInterrupt:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next one ends what still cleans up
        print_text("llamax: interrupted", sys.stderr)
        return Interrupted.exit_code


def _print_error(text: str) -> None:
    """Print an error: one line, or those of ``refuse``; a line break in a path is no new line."""
    lines = (printable_line(line, LONGEST) for line in text.split("\n  "))
    print_text("llamax: " + "\n  ".join(lines), sys.stderr)


def describe_refusal(error: OSError) -> str | None:
    """An error of the file system as a line; None for an error that is a defect of llamax."""
    path = error.filename2 or error.filename
    if path is None:
        if error.errno not in UNNAMED:
            return None
        return f"a file or device failed: {error.strerror}; choose a folder on another file system"
    if error.errno in UNSUPPORTED:
        return (
            f"cannot use {path}: {error.strerror}; its file system lacks an operation that llamax "
            "needs, choose a folder on another one"
        )
    if error.errno in FAILURES:
        return f"cannot use {path}: {error.strerror}; its file system or device failed"
    return f"cannot use {path}: {error.strerror}" if error.errno in REFUSALS else None


def summary(doc: str) -> str:
    """What a program does, from its docstring "USAGE: it does this.", as ``--help`` prints it."""
    does = doc.split("\n\n")[0].replace("``", "").partition(": ")[2]
    return does[:1].upper() + does[1:]


def steady_heap() -> None:
    """Restart this program without glibc's per-thread cache, where the cache makes memory grow.

    torch asks for aligned blocks.  glibc before 2.38 cuts one out of a slightly larger block and
    frees the ends; its per-thread cache gives those to small requests and never joins them again.
    So a block that torch frees is a few bytes too short for its next request of the same size, and
    the heap grows.  glibc reads the setting when a process starts: hence ``exec``, with the same
    process id and command line, after some 20 ms.  The signals of ``llamax.runtime.signals`` are
    blocked meanwhile; it unblocks them.  A GLIBC_TUNABLES that names the cache is kept.
    """
    library, _, version = (
        os.confstr("CS_GNU_LIBC_VERSION") or "" if sys.platform == "linux" else ""
    ).partition(" ")
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if library != "glibc" or "tcache_count" in tunables or not sys.executable:
        return
    if tuple(int(part) for part in version.split(".")[:2]) >= (2, 38):
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, NO_CACHE)))
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@contextmanager
def defer_signals() -> Iterator[None]:
    """Deliver SIGINT and SIGTERM after the block instead of inside it, in the main thread.

    For starting a pool of processes: one that is interrupted meanwhile forgets its workers, and the
    program would wait for them for ever when it ends.
    """
    arrived: list[int] = []
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        both = (signal.SIGINT, signal.SIGTERM)
        before = {n: h for n in both if (h := signal.getsignal(n)) is not None}
    try:
        for number in before:
            signal.signal(number, lambda number, frame: arrived.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for arrival in arrived[:1]:
            signal.raise_signal(arrival)


def wait_for_end(poll: Callable[[], int | None]) -> int:
    """Wait until a child process has ended, and return its exit code.

    ``poll`` returns the code, or None while the process runs.  A blocking wait would not do: Python
    handles a signal that comes between its last look at signals and such a wait only after it.
    """
    while (code := poll()) is None:
        time.sleep(POLL_S)
    return code


def process_state(pid: int) -> tuple[str, int]:
    """The state of a process of this machine, and its start in clock ticks since boot (proc(5)).

    Where there is no /proc the state of a living process is "?", and its start 0.  Raises OSError,
    ValueError, IndexError or OverflowError if there is no such process.
    """
    if not PROC_SELF.exists():
        with suppress(PermissionError):  # it is alive, and another user's
            os.kill(pid, 0)
        return "?", 0
    stat = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return stat[0], int(stat[19])


NO_PROCESS = (OSError, ValueError, IndexError, OverflowError)  # what ``process_state`` raises


def leave_with_parent() -> None:
    """End this worker process when its parent is killed, instead of waiting for work for ever.

    Warnings that the parent has too are shown by the parent alone.
    """
    from multiprocessing import parent_process

    leave_to_parent()

    def watch() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
