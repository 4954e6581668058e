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
from llamax.parallel.pipeline import edge_name
from llamax.runtime.errors import BackendError
from llamax.runtime.logging import logger
from llamax.runtime.units import count

Answer = Literal["warn", "stop", "off"]
ChunkKind = tuple[bool, bool, int]  # whether first, whether last of all, layers


def chunk_kinds(counts: Sequence[int], stage: Seat = ALONE) -> list[ChunkKind]:
    """The chunks of a stage, those with equal programs alike; ``counts``: layers of all chunks."""
    last = len(counts) - 1
    return [
        (place == 0, place == last, counts[place])
        for place in range(stage.rank, len(counts), stage.size)
    ]


def passes(kinds: Iterable[ChunkKind]) -> int:
    """The number of programs of forward and backward passes; after the last layer both are one."""
    return sum(1 if last else 2 for _, last, _ in {*kinds})


def edges(stages: int, counts: Sequence[int]) -> range:
    """The edges of a pipeline; with several chunks the last stage has one to the first."""
    return range(stages if len(counts) > stages else stages - 1)


def programs(
    stage: Seat = ALONE, counts: Sequence[int] = (1,), tied: bool = False
) -> dict[str, int]:
    """The number of programs that a rank compiles, by part of the loop.

    In a pipeline those of its passes, of its swaps, and the parts of an update or of a validation's
    mean before, in and after each sum over all stages.  ``counts``: the layers of each chunk, in
    the order of the model; ``tied``: whether this stage sums the gradient of the embedding with
    the other end of the pipeline.
    """
    if stage.size == 1:
        return {"training": 2, "validation": 1}
    kinds, (number, stages) = chunk_kinds(counts, stage), stage
    own = [edge for edge in edges(stages, counts) if number in (edge, (edge + 1) % stages)]
    swaps = len({edge_name(edge, stages) for edge in own})
    return {"training": passes(kinds) + swaps + 2 * tied + 5, "validation": len({*kinds}) + 3}


class Counters(Protocol):
    """What a tracing backend counts, since the process began."""

    def compilations(self) -> int: ...

    def host_reads(self) -> int: ...


def all_programs(stages: int, counts: Sequence[int], validates: bool, tied: bool = False) -> int:
    """The number of programs that all ranks compile together, from the layers of each chunk.

    Chunks and stages between the first and the last share those of others with as many layers.
    """
    if stages == 1:
        return sum(programs().values()) if validates else programs()["training"]
    held = [chunk_kinds(counts, Seat(stage, stages)) for stage in range(stages)]
    kinds = {kind for each in held for kind in each}
    updated = {(each[0][0], each[-1][1], sum(kind[2] for kind in each)) for each in held}
    swaps = len({edge_name(edge, stages) for edge in edges(stages, counts)})
    summed = 3 + 2 * tied + 2 * len(updated)
    return passes(kinds) + swaps + summed + (3 + len(kinds) if validates else 0)


class CompileGuard:
    """Watches ``counters``, None where nothing is compiled; ``answer`` is run.compile_guard.

    ``stage``, ``counts`` and ``tied`` as of ``programs``.
    """

    def __init__(
        self,
        counters: Counters | None,
        answer: Answer,
        stage: Seat = ALONE,
        counts: Sequence[int] = (1,),
        tied: bool = False,
    ) -> None:
        self.most = programs(stage, counts, tied)
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
        extra = count(more, "program")
        message = f"step {step}: {part} compiled {extra} more than it needs, because {cause}"
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
