"""``llamax watch`` on a terminal: it ends by the key q, and leaves the terminal as it was."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.run_folders import make_run

from llamax.runtime import terminal

ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
FAILING = """
import sys
from llamax.tools.monitor import watch
from llamax.cli import watch as command
def fail(*words): raise RuntimeError("a defect")
command.render = fail
command.main(sys.argv[1:])
"""


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *argv: str, **environ: str) -> None:
        self.ours, self.theirs = pty.openpty()
        self.before = termios.tcgetattr(self.theirs)
        self.text = ""
        self.decode = codecs.getincrementaldecoder("utf-8")().decode  # a read may end in a letter
        self.process = subprocess.Popen(
            [sys.executable, *argv],
            stdin=self.theirs,
            stdout=self.theirs,
            stderr=self.theirs,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24", **environ},
            preexec_fn=self._take,
        )

    def _take(self) -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline, self.text
            self.read(0.1)

    def read(self, timeout_s: float) -> bool:
        if not select.select([self.ours], [], [], timeout_s)[0]:
            return False
        self.text += self.decode(os.read(self.ours, 4096))
        return True

    def press(self, keys: bytes) -> None:
        os.write(self.ours, keys)

    def end(self) -> int:
        self.wait_for(lambda: self.process.poll() is not None)
        while self.read(0.0):
            pass
        return self.process.returncode

    @property
    def restored(self) -> bool:
        """The modes are those before, and the first screen is shown with its cursor."""
        shown = self.text.rfind(LEAVE) > self.text.rfind(ENTER)
        return shown and termios.tcgetattr(self.theirs) == self.before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture
def watching(tmp_path: Path) -> Iterator[Terminal]:
    """A view of a run that trains."""
    run = make_run(tmp_path / "tuned", 12, ranks=2)
    for path in (run / "heartbeats").iterdir():
        os.utime(path)
    terminal = Terminal("-m", "llamax", "watch", str(run), "--every", "600", NO_COLOR="")
    terminal.wait_for(lambda: "checkpoint" in terminal.text)
    yield terminal
    terminal.close()


@pytest.mark.parametrize("key", [b"q", b"Q", b"\x03"], ids=["q", "Q", "Ctrl-C"])
def test_a_key_ends_the_view(watching: Terminal, key: bytes) -> None:
    assert termios.tcgetattr(watching.theirs)[3] & (termios.ICANON | termios.ECHO) == 0
    watching.press(key)
    assert watching.end() == 0
    assert watching.restored
    last = watching.text.rpartition(LEAVE)[2]
    assert "step 12/40" in last.replace("\x1b[0m", "")
    assert "^C" not in last


def test_a_view_waits_for_a_run_that_has_not_begun(tmp_path: Path) -> None:
    terminal = Terminal("-m", "llamax", "watch", str(tmp_path / "tuned"), "--every", "0.1")
    try:
        terminal.wait_for(lambda: "waiting for a run to begin" in terminal.text)
        make_run(tmp_path / "made", 12, ranks=2).rename(tmp_path / "tuned")
        terminal.wait_for(lambda: "12/40" in terminal.text)
        terminal.press(b"q")
        assert terminal.end() == 0
        assert terminal.restored
    finally:
        terminal.close()


def test_waiting_for_a_run_ends_by_a_key(tmp_path: Path) -> None:
    terminal = Terminal("-m", "llamax", "watch", str(tmp_path / "none"), "--every", "600")
    try:
        terminal.wait_for(lambda: "waiting for a run to begin" in terminal.text)
        terminal.press(b"q")
        assert terminal.end() == 0
        assert terminal.restored
        assert "Traceback" not in terminal.text
    finally:
        terminal.close()


def test_another_key_shows_the_run_again(watching: Terminal) -> None:
    watching.press(b"x")
    watching.wait_for(lambda: watching.text.count("checkpoint") > 1)
    watching.press(b"q")
    assert watching.end() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_terminal_as_it_was(watching: Terminal, number: int) -> None:
    watching.process.send_signal(number)
    assert watching.end() == 128 + number
    assert watching.restored
    assert "Traceback" not in watching.text


def test_a_stop_leaves_the_screen_and_comes_back(watching: Terminal) -> None:
    """No shell waits for this process, so the kernel does not stop it: it comes back at once."""
    watching.process.send_signal(signal.SIGTSTP)
    watching.wait_for(lambda: watching.text.count(ENTER) == 2)
    assert watching.text.index(LEAVE) < watching.text.rindex(ENTER)
    watching.press(b"q")
    assert watching.end() == 0
    assert watching.restored


def test_a_signal_just_before_a_wait_is_handled_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a signal does not end ``select``; only its timeout does."""
    ours, theirs = pty.openpty()
    waits: list[float] = []

    def select_after_a_signal(*arguments: object) -> tuple[list[int], list[int], list[int]]:
        waits.append(float(str(arguments[3])))
        if len(waits) == 4:
            os.write(ours, b"q\n")
            return select.select([theirs], [], [])
        return [], [], []

    keys = terminal._Keys()
    keys.file, keys._before = theirs, []
    monkeypatch.setattr(terminal, "select", SimpleNamespace(select=select_after_a_signal))
    assert keys.read(600.0) == "q\n"
    assert len(waits) == 4
    assert max(waits) <= 1.0
    os.close(ours)
    os.close(theirs)


def test_a_defect_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tuned", 12)
    terminal = Terminal("-c", FAILING, str(run))
    try:
        assert terminal.end() == 1
        assert terminal.restored
        assert "a defect" in terminal.text.rpartition(LEAVE)[2]
    finally:
        terminal.close()


@pytest.mark.parametrize("environ", [{"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_terminals_without_codes(tmp_path: Path, environ: dict[str, str]) -> None:
    run = make_run(tmp_path / "tuned", 40)
    terminal = Terminal("-m", "llamax", "watch", str(run), **environ)
    try:
        assert terminal.end() == 0
        assert ("\x1b" in terminal.text) == ("TERM" not in environ)
        assert "\x1b[1m" not in terminal.text
        assert "step 40/40" in terminal.text
    finally:
        terminal.close()
