"""Scripts of ``support`` in a process of their own, with the same import paths as the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    """The environment of this process, with ``tests/`` on the import path."""
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def run_script(name: str, *argv: str, timeout_s: float = 3600) -> str:
    """The standard output of ``python -m support.NAME``, which must exit with 0."""
    command = [sys.executable, "-m", f"support.{name}", *argv]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
