"""The log of a run in constant memory: what a live view shows of any number of records.

::

    metrics.jsonl   r r r r r r r r r r r r r r r r    each line once, in blocks
    trends          [  mean  ][  mean  ][  mean  ]..   at most 2,048 means of consecutive records
    recent                                    r r r    the last 50, whole

When a trend has ``MOST_VALUES`` means, neighbours are joined and each then covers twice as many
records.  Of more than ``LONG_BYTES`` read at once, ``SAMPLES`` evenly spaced lines are parsed
whole; of the others only the seconds, which tell the starts of a resumed run apart.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from operator import gt
from pathlib import Path
from typing import BinaryIO

from llamax.runtime.errors import DataError
from llamax.runtime.files import plain_file
from llamax.training.metrics import Record

WINDOW = 50  # last records, for percentiles and rates
TRENDS = ("loss", "grad_norm", "tokens_per_s", "mfu", "lr")
MOST_VALUES = 2048  # means of a trend; a sparkline has 26 cells
LARGEST = 1e100  # sums and differences of larger values may be infinite
LONG_BYTES = 2**22  # a stretch of more is sampled, but for its end
TAIL_BYTES = 2**19
SAMPLES = 4096
KEPT_BYTES = 256
BLOCK_BYTES = 2**22
SECONDS = re.compile(rb'"seconds"\s*:\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)')
MARK = b'"skipped_samples"'  # in the record of a step without an update
NAN = float("nan")
STRANGE = (ValueError, TypeError, OverflowError)  # a line that is not a record


class Trend:
    """Means of consecutive values, at most ``MOST_VALUES``; NaN where no value was finite."""

    def __init__(self) -> None:
        self.means: list[float] = []
        self.per_mean = 1
        self._sum = self._finite = self._count = 0.0

    def add(self, value: float, count: float = 1) -> None:
        """Append a value that stands for ``count`` records."""
        if abs(value) < LARGEST:
            self._sum += value * count
            self._finite += count
        self._count += count
        if self._count < self.per_mean:
            return
        self.means.append(self._last())
        self._sum = self._finite = self._count = 0.0
        if len(self.means) >= MOST_VALUES:
            self.means = [*map(_mean, self.means[::2], self.means[1::2])]
            self.per_mean *= 2

    def values(self) -> list[float]:
        """All means, the last perhaps of fewer records."""
        return [*self.means, self._last()] if self._count else list(self.means)

    def _last(self) -> float:
        return self._sum / self._finite if self._finite else NAN


def _mean(first: float, second: float) -> float:
    """The mean of the values that are not NaN."""
    if first != first:
        return second
    return first if second != second else (first + second) / 2


@dataclass(frozen=True)
class History:
    """The records of a log so far: the ``recent`` ones, and what is known of all.

    ``starts_s``: seconds of training of all earlier starts of a resumed run; ``validation_loss``:
    the last one; ``trends``: the course of the values in ``TRENDS``; ``skipped``: number of steps
    without an update.
    """

    count: int = 0
    skipped: int = 0
    recent: Sequence[Record] = ()
    starts_s: float = 0.0
    validation_loss: float | None = None
    trends: dict[str, list[float]] = field(default_factory=dict)

    @property
    def last(self) -> Record | None:
        """The last record."""
        return self.recent[-1] if self.recent else None

    @property
    def spent_s(self) -> float:
        """Seconds of training so far, summed over all starts of a resumed run."""
        return self.starts_s + (self.last.seconds if self.last else 0.0)


class LiveLog:
    """A log that grows: what was read is not read again, unless the file was written anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget(0)

    def _forget(self, inode: int) -> None:
        self._inode, self._end, self._count = inode, 0, 0  # end: of the whole lines read so far
        self._before = b""  # the last bytes before the end
        self._skipped = 0
        self._recent: deque[Record] = deque(maxlen=WINDOW)
        self._starts_s = self._seconds = 0.0
        self._validation_loss: float | None = None
        self._trends = {name: Trend() for name in TRENDS}

    def read(self) -> History:
        """The records so far; a last line that is cut short is left out.

        Raises DataError where another line is not a record.
        """
        if not self.path.exists():
            return History()
        with open(self.path, "rb", opener=plain_file) as file:
            about = os.fstat(file.fileno())
            if about.st_ino != self._inode or not self._goes_on(file):
                self._forget(about.st_ino)
            file.seek(self._end)
            if about.st_size - self._end > LONG_BYTES:
                self._skim(file, about.st_size - TAIL_BYTES)
            lines = file.read().splitlines(keepends=True)
        if not lines:
            return self._history()
        for line in lines[:-1]:
            self._take(line, self._record(line))
        try:
            record = Record.from_json(lines[-1])
        except STRANGE:
            return self._history()
        if lines[-1].endswith(b"\n"):
            self._take(lines[-1], record)
            return self._history()
        return self._with(record)  # its end will come, and is read with it

    def _skim(self, file: BinaryIO, stop: int) -> None:
        """Take the lines before ``stop``, of which ``SAMPLES`` are parsed whole."""
        step = -(-(stop - self._end) // SAMPLES)
        while self._end < stop:
            block = file.read(min(BLOCK_BYTES, stop - self._end)) + file.readline(BLOCK_BYTES)
            if not block:  # written anew meanwhile
                return
            count = block.count(b"\n")
            seconds = [*map(float, SECONDS.findall(block))]
            if len(seconds) != count:  # some line is no record
                lines = enumerate(block.splitlines())
                seconds = [self._record(line, ahead).seconds for ahead, line in lines]
            self._add_seconds(seconds)
            places = range(min(step // 2, len(block) - 1), len(block), step)
            for place in places:
                self._follow(self._record_at(block, place), count / len(places))
            validated = block.rfind(b'"validation_loss"')
            if validated >= 0:
                self._validation_loss = self._record_at(block, validated).validation_loss
            self._skipped += block.count(MARK)
            self._count += count
            self._pass(block)

    def _record_at(self, block: bytes, place: int) -> Record:
        """The record in the line of a block that the byte ``place`` lies in."""
        start = block.rfind(b"\n", 0, place) + 1
        line = block[start : block.find(b"\n", place)]
        try:
            return Record.from_json(line)
        except STRANGE:
            return self._record(line, block.count(b"\n", 0, start))

    def _take(self, line: bytes, record: Record) -> None:
        """Take a whole line."""
        self._recent.append(record)
        self._follow(record)
        self._add_seconds([record.seconds])
        if record.validation_loss is not None:
            self._validation_loss = record.validation_loss
        self._skipped += record.skipped_samples is not None
        self._count += 1
        self._pass(line)

    def _pass(self, lines: bytes) -> None:
        """Note that the lines were read."""
        self._end += len(lines)
        self._before = lines[-KEPT_BYTES:]

    def _goes_on(self, file: BinaryIO) -> bool:
        """Whether what was read last is still there: a new file may get an old inode."""
        file.seek(self._end - len(self._before))
        return file.read(len(self._before)) == self._before

    def _follow(self, record: Record, count: float = 1) -> None:
        for name, trend in self._trends.items():
            trend.add(getattr(record, name), count)

    def _add_seconds(self, seconds: Iterable[float]) -> None:
        known = [self._seconds, *seconds]
        if any(map(gt, known, known[1:])):
            self._starts_s += sum(a for a, b in pairwise(known) if a > b)
        self._seconds = known[-1]

    def _record(self, line: bytes, ahead: int = 0) -> Record:
        """The record in a line that is ``ahead`` lines behind those taken so far."""
        try:
            return Record.from_json(line)
        except STRANGE:
            where = f"{self.path}:{self._count + ahead + 1}"
            raise DataError(f"{where}: not a record; remove this line") from None

    def _history(self) -> History:
        trends = {name: trend.values() for name, trend in self._trends.items()}
        return History(
            count=self._count,
            skipped=self._skipped,
            recent=tuple(self._recent),
            starts_s=self._starts_s,
            validation_loss=self._validation_loss,
            trends=trends,
        )

    def _with(self, record: Record) -> History:
        """The records so far and one more, whose line has no end yet."""
        known = self._history()
        loss = record.validation_loss
        return replace(
            known,
            count=known.count + 1,
            skipped=known.skipped + (record.skipped_samples is not None),
            recent=(*known.recent, record)[-WINDOW:],
            starts_s=known.starts_s + (self._seconds if record.seconds < self._seconds else 0.0),
            validation_loss=known.validation_loss if loss is None else loss,
            trends={name: [*v, getattr(record, name)] for name, v in known.trends.items()},
        )
