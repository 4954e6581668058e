"""A server of ``llamax serve`` in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LISTENS = re.compile(r" on (http://\S+) \(")


class Server:
    """A running server: ``url``, its process and what it has written."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.lines, self.url = process, list[str](), ""
        assert process.stderr is not None
        for line in process.stderr:
            self.lines.append(line)
            if found := LISTENS.search(line):
                self.url = found[1]
                break
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(self.process.stderr)

    @property
    def log(self) -> str:
        """What the server has written."""
        return "".join(self.lines)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        status = self.process.wait(timeout=300)
        self._reader.join(timeout=300)
        return status


@contextmanager
def served(model: Path, *options: str) -> Iterator[Server]:
    """A server of a model on a free port of the loopback."""
    command = [sys.executable, "-m", "llamax", "serve", str(model), "--port", "0", *options]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        server = Server(process)
        assert server.url, server.log
        yield server
    finally:
        process.kill()
        process.wait()
