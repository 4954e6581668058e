"""How many cores a process may use: the machine's, or as many as OMP_NUM_THREADS says."""

from __future__ import annotations

import os
from pathlib import Path

OMP = "OMP_NUM_THREADS"
RAYON = "RAYON_NUM_THREADS"  # threads of the tokenizers package


def cores() -> int:
    """The number of cores on which this process may run."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def requested_threads() -> int:
    """The threads that OMP_NUM_THREADS asks for, 0 if it asks for none.

    torchrun sets 1 if its own environment has no value: this is no request.  Of a list such as
    ``4,2``, one number for each level of nesting, the first counts.
    """
    first = os.environ.get(OMP, "").partition(",")[0].strip()
    if not first.isdecimal() or (first == "1" and _set_by_torchrun()):
        return 0
    return int(first)


def workers() -> int:
    """The number of processes or threads of a command: OMP_NUM_THREADS, or one per core."""
    return requested_threads() or cores()


def limit_threads() -> None:
    """Let the threads of the tokenizers package follow OMP_NUM_THREADS too."""
    if threads := requested_threads():
        os.environ.setdefault(RAYON, str(threads))


def _set_by_torchrun() -> bool:
    """Whether the parent process is torchrun and was started without OMP_NUM_THREADS."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        started_with = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return False
    return not any(entry.startswith(f"{OMP}=".encode()) for entry in started_with.split(b"\0"))
