"""Reads the folder of a run: while it trains, after it has finished, or after it died.

::

    config.toml          the resolved configuration           llamax.training.setup
    environment.json     where it runs, and with what         llamax.training.run_metadata
    metrics.jsonl        a record per reported step           llamax.training.metrics
    heartbeats/rank-N    the last heartbeat of a rank          llamax.training.heartbeat
    checkpoints/step-N   complete checkpoints                  llamax.checkpoint
    neuron-monitor*.json use of the devices              llamax.tools.monitor.neuron_monitor

The run need not cooperate, and neither its machine nor torch is needed; missing files are skipped.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamax.config.constants import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    HEARTBEATS_FOLDER,
    LOCK_FILE,
    METRICS_FILE,
)
from llamax.config.load import config_in
from llamax.config.schema import Config
from llamax.runtime.errors import DataError, LinkError
from llamax.runtime.files import read_file, same_file
from llamax.runtime.json_reader import JsonError, parse_object
from llamax.runtime.text import printable_line
from llamax.tools.monitor.live_log import History, LiveLog
from llamax.tools.monitor.neuron_monitor import core_utilization
from llamax.training.heartbeat import DONE, LOST, MOST_BYTES, Beat
from llamax.training.metrics import Record

if TYPE_CHECKING:
    from llamax.tools.monitor.columns import Numbers

RANK_FILE = re.compile("rank-[0-9]+")
MOST_TEXT = 2000  # characters of a value of environment.json
NUMBERS = (
    "ranks",
    "nodes",
    "step",
    "dollars_per_hour",
)  # in environment.json; ignored unless numbers
SILENT_S = 30.0  # a rank writes its heartbeat every few seconds
SKEW_S = 600.0  # between clocks of machines; a file from further in the future says nothing of now
COLUMNS = (
    "consumed_tokens",
    "loss",
    "validation_loss",
    "grad_norm",
    "tokens_per_s",
    "step_s",
    "lr",
    "memory_bytes",
    "mfu",
)


@dataclass(frozen=True)
class Rank:
    """The last heartbeat of a rank, and its age."""

    number: int
    beat: Beat
    silent_s: float

    @property
    def state(self) -> str:
        """alive, silent, done, or the reason why it ended."""
        if self.beat.left:
            return "done" if self.beat.left == DONE else self.beat.left.removeprefix(LOST)
        return "alive" if self.silent_s < SILENT_S else "silent"


@dataclass(frozen=True)
class SavedCheckpoint:
    """A complete checkpoint: step, size, and time when it was finished."""

    step: int
    size_bytes: int
    time: float


@dataclass(frozen=True)
class RunFolder:
    """The content of a folder at the time ``now``."""

    folder: Path
    now: float
    config: Config | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    history: History = field(default_factory=History)
    written: float = 0.0  # time of the last record
    ranks: tuple[Rank, ...] = ()
    saved: tuple[SavedCheckpoint, ...] = ()
    cores: dict[str, float] = field(default_factory=dict)  # use of each device core, 0 to 1
    label: str = ""  # replaces the name of the folder
    locked: bool | None = None  # a process of this machine writes here; None: unknown

    @property
    def name(self) -> str:
        """The label, or the name of the folder, with its parent for names like ``run``."""
        if self.label:
            return self.label
        plain = self.folder.name in ("run", "runs", "out", "output")
        parent = f"{self.folder.absolute().parent.name}/" if plain else ""
        return printable_line(f"{parent}{self.folder.name}")

    @property
    def mesh(self) -> str:
        """The degrees of the mesh: tensor, others above 1, and data if the ranks are known."""
        if self.config is None:
            return ""
        parallel = self.config.parallel
        tensor, context, pipeline = parallel.tensor, parallel.context, parallel.pipeline
        data = int(self.environment.get("ranks", 0)) // (tensor * context * pipeline)
        degrees = [f"tensor {tensor}"]
        degrees += [f"context {context}"] if context > 1 else []
        degrees += [f"pipeline {pipeline}"] if pipeline > 1 else []
        return " x ".join([*degrees, f"data {data}"] if data else degrees)

    @property
    def last(self) -> Record | None:
        """The last record."""
        return self.history.last

    @cached_property
    def columns(self) -> dict[str, Numbers]:
        """The fields ``COLUMNS`` of all records, read from the folder when they are first used."""
        from llamax.tools.monitor.columns import read_columns

        return read_columns(self.folder / METRICS_FILE, COLUMNS)

    @property
    def step(self) -> int:
        """The last step known to be done: by reports, by heartbeats, or before this start."""
        reported = self.last.step if self.last else int(self.environment.get("step", 0))
        at_work = min((rank.beat.step for rank in self.ranks), default=0)
        return min(max(reported, at_work - 1), max(self.steps, reported))

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config.run.steps if self.config else self.last.step if self.last else 0

    @property
    def ended_early(self) -> bool:
        """Whether ``run.patience`` ended the run at the last record."""
        waited = (self.last and self.last.validations_waited) or 0
        return self.config is not None and 0 < self.config.run.patience <= waited

    @property
    def state(self) -> str:
        """starting, running, stuck (a rank waits for a silent one), finished, stopped or dead."""
        if self.last is not None and (self.last.step >= self.steps or self.ended_early):
            return "finished"
        if self.ranks:
            states = {rank.state for rank in self.ranks}
            if states <= {"alive"}:
                return "running" if self.config or self.last else "starting"
            if states == {"alive", "silent"}:
                return "stuck"
            return "stopped" if states <= {"done"} else "dead"
        if self.locked is False:
            return "stopped"
        if self.last is None:
            return "starting"
        if self.locked:
            return "running"
        usual_s = max(record.step_s for record in self.history.recent)
        every = self.config.run.log_every if self.config else 1
        return "running" if self.now - self.written < SILENT_S + 5 * every * usual_s else "dead"

    @property
    def remaining_s(self) -> float:
        """Seconds until the last step, at the median rate of the last records."""
        if self.last is None or self.ended_early:
            return 0.0
        pace = statistics.median(record.step_s for record in self.history.recent)
        return max(self.steps - self.step, 0) * pace

    @property
    def spent_s(self) -> float:
        """Seconds of training so far, summed over all starts of a resumed run."""
        return self.history.spent_s

    @property
    def dollars_per_hour(self) -> float:
        """Price of all nodes; 0 where it is not known."""
        return float(self.environment.get("dollars_per_hour", 0.0))


class Cache:
    """What a view of a run need not read again: its log, and the sizes of its checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.log = LiveLog(folder / METRICS_FILE)
        self.sizes = dict[Path, tuple[tuple[int, ...], int]]()


def read_run(folder: Path, now: float | None = None, cache: Cache | None = None) -> RunFolder:
    """The content of ``folder``; ``cache`` keeps what earlier calls have read.

    Raises DataError where it is not the folder of a run.
    """
    check_is_run(folder)
    metrics = folder / METRICS_FILE
    now = time.time() if now is None else now
    cache = cache or Cache(folder)
    environment = {
        name: value
        for name, value in _json(folder / ENVIRONMENT_FILE).items()
        if name not in NUMBERS or (type(value) in (int, float) and 0 <= value < 2**31)
    }
    return RunFolder(
        folder=folder,
        now=now,
        config=config_in(folder),
        environment=environment,
        history=cache.log.read(),
        written=metrics.stat().st_mtime if metrics.exists() else 0.0,
        ranks=tuple(ranks(folder / HEARTBEATS_FOLDER, now, environment.get("ranks"))),
        saved=tuple(checkpoints(folder / CHECKPOINTS_FOLDER, cache)),
        cores=core_utilization(sorted(folder.glob("neuron-monitor*.json*"))),
        locked=locked(folder / LOCK_FILE),
    )


def check_is_run(folder: Path) -> None:
    """Raise DataError where ``folder`` is not that of a run."""
    if not any((folder / name).exists() for name in (CONFIG_FILE, METRICS_FILE, LOCK_FILE)):
        found = f"has neither {CONFIG_FILE} nor {METRICS_FILE}"
        if is_empty(folder):
            found = "is empty" if folder.exists() else "does not exist"
            found += "; a run makes its folder some seconds after its start"
        raise DataError(
            f"{folder}: is not the folder of a run ({found}); use the run.folder of a training run"
        )


def is_empty(folder: Path) -> bool:
    """Whether a folder does not exist or holds nothing, as before a run has begun in it."""
    return not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir()))


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, with texts that are safe for a terminal; empty without one."""
    try:
        found = parse_object(read_file(path))
    except (OSError, LinkError, JsonError):
        return {}
    return {printable_line(key, MOST_TEXT): _safe(value) for key, value in found.items()}


def _safe(value: Any) -> Any:
    return value if isinstance(value, bool | int | float) else printable_line(value, MOST_TEXT)


def locked(path: Path) -> bool | None:
    """Whether the process of the run holds its lock; None where it was on another machine."""
    try:
        with open(path, "rb", opener=same_file) as file:
            owner = file.read(MOST_BYTES).decode(errors="replace")
            if f" on {socket.gethostname()} since" not in owner:
                return None
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except (OSError, LinkError):
        return None


def ranks(folder: Path, now: float, count: object) -> Iterable[Rank]:
    """The heartbeats in a folder, by rank.

    ``count``: the number of ranks, where it is known.  Files of an earlier start with more ranks
    are skipped; a single rank writes none.
    """
    known = count if isinstance(count, int) and count > 1 else 0 if count == 1 else None
    names = os.listdir(folder) if folder.is_dir() else []
    for name in sorted(name for name in names if RANK_FILE.fullmatch(name))[:known]:
        try:
            number = int(name.removeprefix("rank-"))
            with open(f"{folder}/{name}", "rb", opener=same_file, buffering=0) as file:
                beat = Beat.from_json(file.read(MOST_BYTES))
                age = now - os.fstat(file.fileno()).st_mtime
        except (OSError, LinkError, ValueError, TypeError):
            continue
        yield Rank(number, beat, max(age, 0.0) if age > -SKEW_S else -age)


def checkpoints(folder: Path, cache: Cache) -> Iterable[SavedCheckpoint]:
    """The complete checkpoints in a folder, oldest first.

    A checkpoint is measured again only if a file or folder was added to it or taken from it.
    """
    for path in sorted(folder.glob("step-*")):
        step, done = path.name.removeprefix("step-"), path / "done"
        try:
            if not (step.isdecimal() and done.is_file()):
                continue
            about, written = path.stat(), done.stat().st_mtime
            state = (about.st_ino, about.st_mtime_ns)
            known, size = cache.sizes.get(path, ((), 0))
            if known != state:
                size = sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
                cache.sizes[path] = (state, size)
            saved = SavedCheckpoint(int(step), size, written)
        except OSError:  # the run is deleting it, or it may not be read
            continue
        yield saved


def percentiles(values: Sequence[float], of: Sequence[int]) -> list[float]:
    """Nearest-rank percentiles ``of`` (0 to 100) of the values."""
    ordered = sorted(values)
    return [ordered[max(-(-len(ordered) * p // 100) - 1, 0)] for p in of]
