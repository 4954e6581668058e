"""Progress of long work, on stderr: a bar on a terminal, otherwise a line of the log now and then.

::

    consolidate  3.20G/12.6GiB |██████▎                |  25%  left 00:41       one line that moves
    llamax: consolidate: 3.20 GiB of 12.6 GiB, left 41s                         in a log file

Work that takes less than FIRST_S seconds shows nothing, and standard output gets nothing.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from llamax.runtime.logging import logger, shows_bars
from llamax.runtime.units import count, eta, plural_of, show_bytes, show_time

FIRST_S, LEAST_S = 2.0, 0.3  # until work is shown; and at least this much of it
EVERY_S, SHARE = 10.0, 0.25  # between lines of a log: seconds, and at least this share of all
MOVES_S = 0.5  # between two views of a bar that does not move by itself
BAR = "{desc}  {n_fmt}/{total_fmt}{unit} |{bar}| {percentage:3.0f}%  left {remaining}{postfix}"
ENDLESS = "{desc}  {elapsed}{postfix}"

T = TypeVar("T")
P = TypeVar("P", bound="Progress")


class Progress:
    """The progress of ``name``: ``total`` units, or work of unknown length; a context manager.

    ``unit``: a noun in the singular, or B for bytes.  ``began``: when the program did, on
    time.perf_counter; by default now.  ``show``: whether this process shows anything.
    """

    def __init__(
        self,
        name: str,
        total: float | None = None,
        unit: str = "B",
        *,
        began: float | None = None,
        show: bool = True,
    ) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, 0.0
        self._show = show
        self._start = time.perf_counter()
        self._began = self._start if began is None else began
        self._bar: Any = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="llamax-progress", daemon=True)

    def __enter__(self: P) -> P:
        if self._show and shows_bars(sys.stderr):
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total,
                desc=self.name,
                unit=_bar_unit(self.unit),
                unit_scale=self.unit == "B",
                unit_divisor=1024,
                delay=max(LEAST_S, FIRST_S - (self._start - self._began)),
                dynamic_ncols=True,
                leave=False,
                bar_format=ENDLESS if self.total is None else BAR,
            )
        if self._show:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._show:
            self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def start(self, total: float, unit: str = "") -> None:
        """Set the amount of work, where it was not known before."""
        self.total, self.unit = total, unit or self.unit
        if self._bar is not None:
            self._bar.total, self._bar.bar_format = total, BAR
            self._bar.unit, self._bar.unit_scale = _bar_unit(self.unit), self.unit == "B"

    def update(self, amount: float = 1) -> None:
        """Count work that is done."""
        self.done += amount
        if self._bar is not None:
            self._bar.set_postfix_str(self.detail(), refresh=False)
            self._bar.update(amount)

    def detail(self) -> str:
        """What a bar shows at its end."""
        return ""

    def line(self) -> str:
        """The state as a line of a log."""
        spent = time.perf_counter() - self._start
        if self.total is None:
            return f"{self.name}: {show_time(spent)} so far"
        left = eta(0, 1, spent * (self.total - self.done) / self.done) if self.done else 0.0
        return progress_line(self.name, self.done, self.total, self.unit, left)

    def _watch(self) -> None:
        wait = max(LEAST_S, FIRST_S - (self._start - self._began))
        while not self._over.wait(wait):
            if self._bar is None:
                logger.info("%s", self.line())
                wait = max(EVERY_S, SHARE * (time.perf_counter() - self._start))
            else:
                self._bar.set_postfix_str(self.detail(), refresh=False)
                self._bar.refresh()
                wait = MOVES_S


def _bar_unit(unit: str) -> str:
    """What follows the total in a bar: 12.6GiB, 40 rows."""
    return "iB" if unit == "B" else f" {plural_of(unit)}"


def progress_line(name: str, done: float, total: float, unit: str, left_s: float) -> str:
    """How much of some work is done, and the seconds left; 0: not known."""
    if unit == "B":
        amount = f"{show_bytes(done)} of {show_bytes(total)}"
    else:
        amount = f"{done:,.0f} of {count(round(total), unit)}"
    return f"{name}: {amount}{f', left {show_time(left_s)}' if left_s else ''}"


def reported(stage: str, began: float | None = None, *, show: bool = True) -> Progress:
    """Show that a stage of unknown length goes on, if it takes long; a context manager."""
    return Progress(stage, began=began, show=show)


def tracked(
    items: Iterable[T], name: str, total: int, unit: str, *, show: bool = True
) -> Iterator[T]:
    """The items, ``total`` in number; each counts as done when the next is asked for."""
    with Progress(name, total, unit, show=show) as progress:
        for item in items:
            yield item
            progress.update()
