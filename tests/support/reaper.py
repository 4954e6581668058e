"""Runs daemons until its standard input ends, then ends them and all of their descendants.

Started with a pipe as standard input, it ends what it started when its parent ends, even by
SIGKILL.  Processes that leave their parents (jobs of Slurm) become its children, so that it finds
them.  Linux only; standard library only.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
TERM_S = 10.0  # time for the daemons to end by themselves


def main(commands: list[list[str]]) -> None:
    """Start ``commands`` in their order, half a second apart; each log is standard output."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    daemons = []
    for command in commands:
        daemons.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))
        time.sleep(0.5)
    sys.stdin.read()
    for daemon in reversed(daemons):
        daemon.terminate()
        with suppress(subprocess.TimeoutExpired):
            daemon.wait(TERM_S)
    while children := Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        for child in children:
            os.kill(int(child), signal.SIGKILL)
            os.waitpid(int(child), 0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
