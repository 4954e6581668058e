"""Names the rank that is lost: every rank rewrites a small file as long as it lives.

::

    run/heartbeats/rank-00003    {"beat": 41, "step": 17, "host": "node1", "pid": 812,
                                  "started": 90210, "job": "12345", "left": ""}

A thread rewrites the file every few seconds; it stops when the process is killed or frozen, and
goes on while the rank waits for another.  A rank that ends by itself writes the reason to ``left``.

When a collective fails, a rank compares two readings of all files and names those that fell silent.
Where no collective ever fails (a device runtime may wait for good), the threads act: rank 0 watches
all, all watch rank 0, and silence of ``timeout_s`` + ``PATIENCE_S`` ends the process.  Time is
counted in readings, so neither clocks of other machines nor a suspended job mislead.

Others may write to the folder.  A file of another user than this rank's own is no heartbeat, and
the end of a rank of another ``job`` ends nothing here.  What a file held before this rank began may
be of the job before, and its ``left`` shortens no time limit.  A process is the one that wrote a
heartbeat only if it started at the same time (``started``, in clock ticks since boot), as its id
may be in use again.  A rank whose file was replaced or removed writes a new one.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llamax.parallel.mesh import Mesh
from llamax.runtime.errors import LinkError, LlamaxError, LostRank, Stopped
from llamax.runtime.files import make_folder, new_file, refuse_link, same_file
from llamax.runtime.json_reader import parse_object
from llamax.runtime.logging import logger
from llamax.runtime.process import NO_PROCESS, process_state
from llamax.runtime.text import printable_line

PATIENCE_S = 15.0
TURN_S, LAST_TURN_S = 0.1, 5.0
MOST_WORDS = 400  # characters, of up to four bytes each
RECORD_BYTES = 2048
MOST_BYTES = 2**14  # read of a file
LOST, DONE = "lost ", "done"


@dataclass(frozen=True)
class Beat:
    """What a rank's file says."""

    beat: int = 0
    step: int = 0
    host: str = ""
    pid: int = 0
    started: int = 0
    job: str = ""
    left: str = ""

    @classmethod
    def from_json(cls, data: bytes) -> Beat:
        """The heartbeat in a file, its texts safe for a terminal; ValueError if it is not one."""
        values = parse_object(data)
        for name, default in DEFAULTS.items():
            value = values.setdefault(name, default)
            if type(value) is not type(default) or not _in_range(value):
                raise ValueError(f"{name} is not of a heartbeat")
            if isinstance(value, str):
                values[name] = printable_line(value)
        return cls(**values)

    def gone(self) -> bool:
        """Whether this process is certainly dead or stopped: known for those of this machine."""
        if self.host != socket.gethostname():
            return False
        try:
            state, started = process_state(self.pid)
        except NO_PROCESS:
            return True
        return state in "TZX" or (0 not in (self.started, started) and self.started != started)


def _in_range(value: object) -> bool:
    return not isinstance(value, int) or 0 <= value < 2**63


DEFAULTS = asdict(Beat())


class Heartbeat:
    """This rank's file, and its view of the others'.

    ``job`` names what started all ranks; ``mesh`` tells at which stage of a pipeline a rank is.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        timeout_s: float,
        job: str = "",
        mesh: Mesh = Mesh(),  # noqa: B008  (frozen)
    ) -> None:
        self.folder, self.rank, self.world_size, self.mesh = folder, rank, world_size, mesh
        self.interval_s = min(5.0, max(0.2, timeout_s / 20))
        self.most_silent_s = timeout_s + PATIENCE_S
        self.me = Beat(host=socket.gethostname(), pid=os.getpid(), job=printable_line(job))
        self.me = replace(self.me, started=process_state(self.me.pid)[1])
        self._stop, self._writing = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="llamax-heartbeat", daemon=True)
        self._file = self._owner = -1

    def start(self) -> None:
        """Begin to beat, and to watch."""
        make_folder(self.folder)
        refuse_link(self._path(self.rank))
        self._file = self._replace()
        self._owner = os.fstat(self._file).st_uid
        self._write()
        self._thread.start()

    def stop(self, why: str) -> None:
        """Beat no more; the file keeps saying why."""
        self._stop.set()
        self._thread.join(self.interval_s)  # a program that trains goes on without it
        self._write(left=printable_line(why)[:MOST_WORDS])
        with self._writing:
            os.close(self._file)
            self._file = -1

    def at(self, step: int) -> None:
        """This rank begins a step."""
        self._write(step=step)

    def silent(self) -> str:
        """Who is gone, and their last steps, as the start of a sentence; takes some intervals."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        before = {rank: self._read(rank) for rank in others}
        for _ in range(8):
            now = {rank: self._read(rank) for rank in others}
            ended = [r for r in others if now[r].left and not now[r].left.startswith((LOST, DONE))]
            if ended:
                lowest = {now[r].left: r for r in reversed(ended)}  # for several may say the same
                reasons = sorted((r, why) for why, r in lowest.items())[:4]
                return "; ".join(f"{self._at(r, now[r])} ended: {why}" for r, why in reasons)
            gone = [r for r in others if not now[r].left and now[r].gone()]
            if gone:
                return self._names(gone, now) + " died or froze"
            time.sleep(self.interval_s / 2)
        quiet = [r for r in others if now[r] == before[r] and not now[r].left]
        if quiet:
            return self._names(quiet, now) + " fell silent"
        return "every rank is alive, but they do not reach each other"

    def reported_by_lower_rank(self, why: str) -> bool:
        """Whether a lower rank has left for the same reason; ranks look one after another."""
        time.sleep(min(self.rank * TURN_S, LAST_TURN_S))
        why = printable_line(why)[:MOST_WORDS]
        return any(self._read(rank).left == why for rank in range(self.rank))

    def _run(self) -> None:
        watched = [r for r in (range(self.world_size) if self.rank == 0 else [0]) if r != self.rank]
        first = {rank: self._read(rank) for rank in watched}
        last = dict(first)
        silent_s = dict.fromkeys(watched, 0.0)
        while not self._stop.wait(self.interval_s):
            self._write()
            for rank in watched:
                now = self._read(rank)
                still = now == last[rank] and now.left != DONE
                silent_s[rank] = silent_s[rank] + self.interval_s if still else 0.0
                last[rank] = now
                left = now.left and now != first[rank]
                limit_s = PATIENCE_S if left else self.most_silent_s
                if silent_s[rank] > limit_s and not self._stop.is_set():
                    why = f"ended: {now.left}" if now.left else f"silent for {silent_s[rank]:.0f} s"
                    logger.error("%s %s; start the job again", self._at(rank, now), why)
                    self._write(left=LOST + self._at(rank, now))
                    os._exit(LostRank.exit_code)

    def _write(self, step: int | None = None, left: str = "") -> None:
        with self._writing:
            if self._file < 0:  # not started, or gone
                return
            step = self.me.step if step is None else step
            self.me = replace(self.me, beat=self.me.beat + 1, step=step, left=left or self.me.left)
            text = json.dumps(asdict(self.me), ensure_ascii=False).encode(errors="replace")
            try:
                self._renew()
                os.pwrite(self._file, text.ljust(RECORD_BYTES), 0)
            except (OSError, LinkError) as error:  # a full disk must not end a run that can go on
                why = error.strerror if isinstance(error, OSError) else error
                logger.warning("cannot write %s: %s", self._path(self.rank), why)

    def _renew(self) -> None:
        """Put a new file where another process removed or replaced this rank's."""
        path, mine = self._path(self.rank), os.fstat(self._file)
        try:
            there = os.lstat(path)
        except FileNotFoundError:
            there = None
        if there is not None and (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):
            return
        file = self._replace()
        os.close(self._file)
        self._file = file

    def _replace(self) -> int:
        """Open a new file in the place of this rank's, which may be another user's."""
        path = self._path(self.rank)
        partial = path.with_name(f".{path.name}.partial")
        file = new_file(partial, os.O_RDWR)
        os.replace(partial, path)  # replaces a link, and follows none
        return file

    def _read(self, rank: int) -> Beat:
        try:
            with open(self._path(rank), "rb", opener=same_file, buffering=0) as file:
                if self._owner not in (-1, os.fstat(file.fileno()).st_uid):
                    return Beat()
                beat = Beat.from_json(file.read(MOST_BYTES))
        except (OSError, LinkError, ValueError, TypeError):
            return Beat()
        # of another job it only shows that somebody writes
        return beat if beat.job == self.me.job else replace(beat, host="", left="")

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}"

    def _at(self, rank: int, beat: Beat) -> str:
        """A rank in words, with its stage in a pipeline."""
        stage = f"stage {self.mesh.coordinate(rank).pp}, " if self.mesh.pp > 1 else ""
        return f"rank {rank} ({stage}last step {beat.step})"

    def _names(self, ranks: list[int], beats: dict[int, Beat]) -> str:
        named = ", ".join(self._at(rank, beats[rank]) for rank in ranks[:8])
        return named if len(ranks) <= 8 else f"{named} and {len(ranks) - 8} more"


@contextmanager
def beating(heart: Heartbeat) -> Iterator[Heartbeat]:
    """Let this rank's heart beat in the block, while it is part of the world.

    LostRank from inside is raised again with the name of the lost rank.  A mistake that several
    ranks meet, such as a damaged file, is reported by the lowest of them; the others leave
    silently.
    """
    heart.start()
    try:
        yield heart
    except (Stopped, SystemExit):  # all ranks leave together, some a save later than others
        heart.stop(DONE)
        raise
    except LostRank as error:
        who = heart.silent()
        heart.stop(LOST + who)
        raise LostRank(f"{who}: {error}") from error
    except KeyboardInterrupt:
        heart.stop("interrupted from the keyboard")
        raise
    except BaseException as error:
        mistake = error if isinstance(error, LlamaxError) else None
        line = str(mistake).partition("; ")[0] if mistake else repr(error)  # without the remedy
        why = line.splitlines()[0] if line else type(error).__name__
        reported = mistake is not None and heart.reported_by_lower_rank(why)
        heart.stop(why)
        if mistake and reported:
            raise SystemExit(mistake.exit_code) from None
        raise
    heart.stop(DONE)
