"""Reports programs that are compiled after the first step, where all should be compiled once.

On a device that traces programs a step is two of them, microstep and update, and a validation one;
a stage of a pipeline has some more.  Another, or one in a later step, stalls every rank of the
cluster: on Trainium for 25 to 40 minutes.
The guard counts what each part of the loop compiles and, the first time it is too much, says why::

    batches of another shape     their shape is part of the program
    values read in the middle    ``.item()`` and its like end a program where they stand
    neither                      a Python number, or state, that is not the same in every step
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

from llamax.data.loader import Batch
from llamax.parallel.mesh import ALONE, Seat
from llamax.runtime.errors import BackendError
from llamax.runtime.logging import logger
from llamax.runtime.units import count

Answer = Literal["warn", "stop", "off"]


def programs(stage: Seat = ALONE) -> dict[str, int]:
    """The number of programs that a rank compiles, by part of the loop.

    In a pipeline those of its passes, of its swaps, and the parts of an update or of a validation's
    mean before, in and after each sum over all stages.
    """
    if stage.size == 1:
        return {"training": 2, "validation": 1}
    first, last = stage.rank == 0, stage.rank == stage.size - 1
    passes, swaps = (1 if last else 2), (1 if first or last else 2)
    return {"training": passes + swaps + 5, "validation": 1 + 3}


class Counters(Protocol):
    """What a tracing backend counts, since the process began."""

    def compilations(self) -> int: ...

    def host_reads(self) -> int: ...


def all_programs(layers: Sequence[int], validates: bool) -> int:
    """The number of programs that all ranks compile together, from the layers of each stage.

    Stages between the first and the last share those of others with as many layers.
    """
    if len(layers) == 1:
        return sum(programs().values()) if validates else programs()["training"]
    stages = 2 + len({*layers[1:-1]})
    passes, swaps = 2 * stages - 1, min(len(layers) - 1, 2)
    return passes + swaps + 3 + 2 * stages + (3 + stages if validates else 0)


class CompileGuard:
    """Watches ``counters``, None where nothing is compiled; ``answer`` is run.compile_guard."""

    def __init__(self, counters: Counters | None, answer: Answer, stage: Seat = ALONE) -> None:
        self.most = programs(stage)
        self.counters = None if answer == "off" else counters
        self.fatal, self.reported = answer == "stop", False
        self.compiled: Counter[str] = Counter()
        self.shapes: dict[str, None] = {}

    @contextmanager
    def watch(self, part: str, step: int) -> Iterator[None]:
        """Count what the block, ``part`` of step ``step``, compiles.

        Raises BackendError where it is too much and run.compile_guard=stop.
        """
        if self.counters is None or self.reported:
            yield
            return
        compiled, reads = self.counters.compilations(), self.counters.host_reads()
        known = len(self.shapes)
        yield
        new = self.counters.compilations() - compiled
        self.compiled[part] += new
        more = min(new, self.compiled[part] - self.most[part])
        if more <= 0:
            return
        if 0 < known < len(self.shapes):
            before, now = list(self.shapes)[known - 1], list(self.shapes)[-1]
            cause = f"a batch is {now} after {before}; make all batches alike"
        elif self.counters.host_reads() > reads:
            cause = "values are read on the host in the middle of the step; read them after it"
        else:
            cause = (
                "a Python number or state differs between steps; llamax audit names the line, "
                "make it a tensor"
            )
        programs = count(more, "program")
        message = f"step {step}: {part} compiled {programs} more than it needs, because {cause}"
        self.reported = True
        if self.fatal:
            raise BackendError(f"{message}; run.compile_guard=warn goes on")
        logger.warning("%s", message)

    def note_shapes(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches as they come, their shapes noted."""
        for batch in batches:
            shape = ", ".join(
                f"{name} {list(part.shape)}"
                for name, part in batch._asdict().items()
                if part is not None
            )
            self.shapes.setdefault(shape)
            yield batch
