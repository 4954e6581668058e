"""Progress of long work: a bar on a terminal, lines in a log, nothing on standard output."""

from __future__ import annotations

import io
import sys
import threading

import pytest

from llamax.runtime import progress, units
from llamax.runtime.logging import bars_allowed, logger, setup_logging, shows_bars
from llamax.runtime.progress import Progress, progress_line, reported, tracked


class Stream(io.StringIO):
    """A stream that says when it was written to."""

    def __init__(self, terminal: bool, awaited: str) -> None:
        super().__init__()
        self.terminal, self.awaited, self.written = terminal, awaited, threading.Event()

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        done = super().write(text)
        if self.awaited in text:
            self.written.set()
        return done


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_S", 0.0)
    monkeypatch.setattr(progress, "LEAST_S", 0.0)
    monkeypatch.setattr(progress, "MOVES_S", 0.01)
    monkeypatch.setenv("TERM", "xterm")


def stderr(monkeypatch: pytest.MonkeyPatch, terminal: bool, awaited: str = "work") -> Stream:
    stream = Stream(terminal, awaited)
    monkeypatch.setattr(sys, "stderr", stream)
    setup_logging()
    return stream


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("term", ["xterm", "dumb"])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_on_a_terminal_and_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool, term: str
) -> None:
    monkeypatch.setenv("TERM", term)
    bars = terminal and term != "dumb"
    stream = stderr(monkeypatch, terminal, "work  1.00G/4.00GiB |" if bars else "work")
    with Progress("work", 4 * 2**30) as bar:
        bar.update(2**30)
        assert stream.written.wait(300)
    text = stream.getvalue()
    assert ("\r" in text) == bars
    assert ("llamax: " in text) != bars
    if not bars:
        (line,) = text.splitlines()
        assert line.startswith("llamax: work: ")
        assert " of 4 GiB" in line
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("terminal", [True, False])
def test_work_of_unknown_length_shows_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    stream = stderr(monkeypatch, terminal)
    with reported("work"):
        assert stream.written.wait(300)
    assert ("work  00:0" if terminal else "llamax: work: 0.0") in stream.getvalue()


@pytest.mark.usefixtures("at_once")
def test_a_total_that_is_known_later(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stderr(monkeypatch, True, "work  2/8 tensors |")
    with Progress("work") as bar:
        bar.start(8, "tensor")
        for _ in range(2):
            bar.update()
        assert stream.written.wait(300)


def test_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_S", 1e6)
    for terminal in (True, False):
        stream = stderr(monkeypatch, terminal)
        assert [*tracked(range(9), "work", 9, "row")] == [*range(9)]
        assert stream.getvalue() == ""


@pytest.mark.usefixtures("at_once")
def test_a_rank_that_is_not_the_first_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stderr(monkeypatch, True)
    before = {*threading.enumerate()}
    with Progress("work", 2, show=False) as bar:
        bar.update()
        assert {*threading.enumerate()} <= before
    assert stream.getvalue() == ""


@pytest.mark.usefixtures("at_once")
def test_an_error_ends_the_view(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stderr(monkeypatch, True)

    def fail() -> None:
        with Progress("work", 4, "row"):
            assert stream.written.wait(300)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    logger.info("after")
    assert stream.getvalue().endswith("llamax: after\n")
    assert not [thread for thread in threading.enumerate() if thread.name == "llamax-progress"]


@pytest.mark.parametrize(
    ("done", "total", "unit", "left", "line"),
    [
        (3 * 2**30, 12 * 2**30, "B", 61, "merge: 3 GiB of 12 GiB, left 1m01s"),
        (0, 1200, "row", 0, "merge: 0 of 1,200 rows"),
        (0, 1, "file", 0, "merge: 0 of 1 file"),
    ],
)
def test_lines_of_a_log(done: float, total: float, unit: str, left: float, line: str) -> None:
    assert progress_line("merge", done, total, unit, left) == line


def test_nouns_have_their_plurals() -> None:
    found = [
        units.count(number, noun) for number, noun in ((1, "batch"), (3, "batch"), (2, "step"))
    ]
    assert found == ["1 batch", "3 batches", "2 steps"]


def test_bars_can_be_turned_off_for_a_block(at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Stream(True, "some work")
    monkeypatch.setattr(sys, "stderr", terminal)
    setup_logging()
    with bars_allowed(False), reported("some work"):
        assert terminal.written.wait(300)
    assert terminal.getvalue().startswith("llamax: some work: ")
    assert "\r" not in terminal.getvalue()
    with bars_allowed(False), bars_allowed(True):
        assert shows_bars(terminal)
    assert shows_bars(terminal)
