"""The console view: aligned lines that fit the terminal, and a bar that moves every step."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
from support import records

from llamax.runtime.logging import logger, setup_logging
from llamax.training.console import ConsoleWriter, line

RECORD = replace(records.RECORD, seconds=12.5)


def terminal_of(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal of 80 columns in the place of stderr."""
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    return stream


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:], logger.level = handlers, level


def screen(text: str) -> list[str]:
    """The lines that a terminal shows for a text with carriage returns."""
    lines = []
    for row in text.split("\n"):
        cells: list[str] = []
        for part in row.split("\r"):
            cells[: len(part)] = part
        lines.append("".join(cells).rstrip())
    return lines


def test_a_peak_of_memory_that_is_not_known_is_left_out() -> None:
    assert "GiB" in line(RECORD, 100)
    assert " B " not in line(replace(RECORD, memory_bytes=0), 100)


def test_console_lines_are_aligned_and_complete() -> None:
    stream = io.StringIO()
    console = ConsoleWriter(steps=100, stream=stream)
    console.write(RECORD)
    console.write(replace(RECORD, step=99, loss=10.5, mfu=0.0, validation_loss=2.5))
    console.write(replace(RECORD, step=100))
    console.stepped(0.5)
    with console.doing("validating"):
        pass
    console.close()
    first, second, third = stream.getvalue().splitlines()
    assert first == (
        "step   7/100  loss   2.2500  grad    1.500  lr 3.00e-04   8.19K tokens/s  "
        "mfu  37.5%  1.50 GiB  left 46s"
    )
    assert "validation   2.5000" in second
    assert "mfu" not in second
    assert "left 0.50s" in second
    assert third == first.replace("  7/", "100/").replace("left 46s", "left 0.00s")


@pytest.mark.parametrize("validation", [None, 2.5])
@pytest.mark.parametrize("steps", [10, 480_000])
@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_a_line_fits_the_terminal(width: int, steps: int, validation: float | None) -> None:
    record = replace(RECORD, step=steps, validation_loss=validation)
    text, whole = line(record, steps, width), line(record, steps)
    assert "loss   2.2500" in text
    assert len(text) <= width
    assert (text == whole) == (len(whole) <= width)


def test_the_bar_shows_loss_and_time_and_starts_where_the_run_resumes() -> None:
    stream = io.StringIO()
    console = ConsoleWriter(steps=10, step=6, bar=True, stream=stream)
    assert console.bar.n == console.bar.initial == 6
    for step in (7, 8, 9):
        console.stepped(7.0)
        assert console.bar.n == step, "it moves every step, not only with a record"
    console.write(RECORD)
    with console.doing("validating"):  # which is no step, however long it takes
        console.bar.start_t -= 500
    console.bar.refresh()
    console.close()
    text = stream.getvalue()
    assert "step 9/10 |" in text
    assert "  left 7.00s  validating" in text
    assert "  left 7.00s  loss 2.2500" in text
    assert text.count("step  7/10  loss") == 1


def test_lines_of_the_log_stand_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    setup_logging()
    console = ConsoleWriter(steps=480_000, bar=True, stream=terminal)
    for step in range(1, 4):
        console.stepped(0.5)
        console.bar.refresh()
        console.write(replace(RECORD, step=step, validation_loss=2.0))
        logger.info("saving step %d", step)
        with console.doing("validating"):
            logger.warning("it takes long")
    console.bar.refresh()
    shown = screen(terminal.getvalue())
    console.close()
    assert [row for row in shown if row.startswith("llamax: saving")] == [
        f"llamax: saving step {step}" for step in (1, 2, 3)
    ]
    assert shown.count("llamax: it takes long") == 3
    *above, bar = shown
    assert len(above) == 9
    assert not any("|" in row for row in above)
    assert bar.startswith("step 3/480000 |")
    assert max(map(len, shown)) <= 80
    assert "validating" in terminal.getvalue()


def test_another_rank_clears_the_line_of_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    setup_logging("rank 3", main=False)
    logger.warning("cannot write")
    assert terminal.getvalue() == "\r\x1b[Kllamax: [rank 3] cannot write\n"


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    setup_logging("rank 3", main=False)
    logger.log(logging.WARNING, "cannot write")
    assert terminal.getvalue() == "llamax: [rank 3] cannot write\n"


def test_a_loss_scale_and_overflowed_steps_are_shown() -> None:
    shown = line(replace(RECORD, loss_scale=65536.0, overflowed_steps=0), 50)
    assert "  scale 65536     lr " in shown
    shown = line(replace(RECORD, loss_scale=0.5, overflowed_steps=1), 50)
    assert "  scale 0.5      (1 step overflowed)  lr " in shown
    assert "scale" not in line(RECORD, 50)
