"""Traces the programs that one rank of a run would compile, with the code that training runs.

It takes the place of one rank: model and optimizer without memory, real batches of made-up
tokens, ``TrainState`` as training has it.  It visits every kind of step that a run has::

    step 1         first and second microstep, the last of the step, update
    validation     a full batch, and the ragged one that ends the file
    checkpoint     everything that saving reads
    step 2, N      first and last microstep, update

and gives, at each boundary, the program that would be compiled there.  A stage of a pipeline has
a forward and a backward program instead of a microstep's, swaps, and the parts of an update between
the sums over all stages.

``python -m llamax.tools.audit.trace RUN.toml WORLD CORES`` prints each kind of program and its
hash, as JSON, for ``llamax.tools.audit.compile_cache``.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llamax.backends.tracing import Tracer
from llamax.checkpoint.build_model import build_model
from llamax.config.load import load_config
from llamax.data.header import Header
from llamax.data.samples import Samples
from llamax.data.token_file import TokenFile, TokenWriter
from llamax.parallel.mesh import Coordinate, Seat
from llamax.parallel.pipeline import Schedule, Swap, Work, edge_name, forwards, schedule
from llamax.parallel.rendezvous import rendezvous
from llamax.runtime.process import run_main
from llamax.tools.audit import hlo
from llamax.tools.audit.rank_numbers import Places, watched
from llamax.training.compile_guard import ChunkKind, chunk_kinds
from llamax.training.resolve import ResolvedRun, resolve
from llamax.training.step import TrainState

MICROSTEP, UPDATE, VALIDATION, CHECKPOINT = "microstep", "update", "validation", "checkpoint"
SWAP = "swap, "  # then the axis


@dataclass(frozen=True)
class Boundary:
    """A place where a program ends: its kind, when in the run, its HLO text, how long it took."""

    kind: str
    when: str
    text: str
    trace_s: float


class TracedRun:
    """The pieces of a run on global ``rank``, as shapes.

    ``used`` gets the places of the rank whose values its traces use (``rank_numbers``).
    """

    def __init__(
        self, run: ResolvedRun, rank: int, tracer: Tracer, data: Path, used: Places | None = None
    ) -> None:
        self.run, self.tracer, config = run, tracer, run.config
        axes, self.programs = tracer.axes(run.mesh, rank), Programs(tracer)
        if used is not None:
            axes = watched(axes, tracer, used)
        model = build_model(config, None, False, axes, torch.device("meta"))
        self.state = TrainState.build(run, model, axes, self.programs)
        self.state.to(tracer.device)
        tracer.clear_pending()
        samples = Samples(TokenFile(data, "off"), config.data, config.run.seed)
        self.training = samples.loader(axes.dp, 0, shuffle=True, cp=axes.part)
        self.validation = samples.loader(axes.dp, 0, shuffle=False, cp=axes.part)

    def whole(self) -> Iterator[Boundary]:
        """Every kind of step of the run."""
        last = self.run.steps
        yield from self.step(1, (0, 1, -1))
        yield from self.validate(2)
        yield from self.checkpoint()
        for step in dict.fromkeys((min(2, last), last)):
            yield from self.step(step, (0, -1))

    def brief(self) -> Iterator[Boundary]:
        """Each program once."""
        yield from self.step(1, (0,))
        yield from self.validate(1)

    def step(self, step: int, microsteps: Sequence[int]) -> Iterator[Boundary]:
        """An optimizer step of these microbatches of its batch."""
        batches = self.training.at((step - 1) * self.training.global_batch)
        chosen = sorted({place % len(batches) for place in microsteps})
        names = [f"step {step}, microstep {place + 1} of {len(batches)}" for place in chosen]
        works = schedule(*self.state.axes.pp, len(chosen), self.chunks)
        self.programs.expect(
            [*self.passes(works, names, MICROSTEP), *self.parts(UPDATE, f"step {step}, update")]
        )
        with self.tracer.forbid_reads():
            self.state.step((batches[place] for place in chosen), step)
        yield from self.programs.recorded

    def validate(self, batches: int) -> Iterator[Boundary]:
        """Validation of a full microbatch and, of two, the ragged one that ends the file."""
        full, ragged = (self.validation.at(0) + self.validation.at(self.training.global_batch))[:2]
        works, names = (
            forwards(*self.state.axes.pp, 1, self.chunks),
            ("full batch", "ragged batch")[:batches],
        )
        expected = [each for name in names for each in self.passes(works, [name], VALIDATION)]
        if self.run.mesh.pp > 1:
            expected += self.parts(VALIDATION, "after the last batch")
        self.programs.expect(expected)
        with self.tracer.forbid_reads():
            self.state.validate([[full], [ragged]][:batches])
        yield from self.programs.recorded

    @property
    def chunks(self) -> int:
        """The number of chunks of a stage."""
        return len(self.state.model.stage)

    @property
    def stage(self) -> str:
        """The stages with the same update as this one, in words."""
        counts, stages = self.run.chunk_layers, self.run.mesh.pp
        name, layers = self._place(self.state.axes.pp.rank, stages - 1), self.state.model.stage
        uneven = len({sum(counts[stage::stages]) for stage in range(stages)}) > 1
        return f"{name} stage" + (f" of {sum(map(len, layers))} layers" if uneven else "")

    def chunk(self, number: int) -> str:
        """The chunks with the same passes as this stage's ``number``, in words."""
        counts, (rank, stages) = self.run.chunk_layers, self.state.axes.pp
        place = number * stages + rank
        name = self._place(place, len(counts) - 1) + (" chunk" if self.chunks > 1 else " stage")
        return name + (f" of {counts[place]} layers" if len({*counts}) > 1 else "")

    @staticmethod
    def _place(number: int, last: int) -> str:
        return {0: "first", last: "last"}.get(number, "middle")

    def passes(self, works: Schedule, names: Sequence[str], kind: str) -> Iterator[tuple[str, str]]:
        """The programs of a schedule: (kind, when in the run)."""
        stages = self.state.axes.pp.size
        for work, following in itertools.pairwise([*works, None]):
            if isinstance(work, Swap):
                micro = work.up or work.down
                yield SWAP + edge_name(work.edge, stages), names[micro.number if micro else 0]
            elif isinstance(work, Work) and following != Work("backward", work.micro):
                pass_ = "validation" if kind == VALIDATION else work.kind
                name = kind if stages == 1 else f"{pass_}, {self.chunk(work.micro.chunk)}"
                yield name, names[work.micro.number]

    def parts(self, kind: str, when: str) -> list[tuple[str, str]]:
        """The programs of an update or of a validation's mean, cut where all stages sum."""
        if self.run.mesh.pp == 1:
            return [(kind, when)]
        sums = ["tied gradient of a rank", "tied gradient, summed"]
        sums = sums if self.state.optimizer.tied else []
        names = ["loss of a rank", "loss, summed", *sums, f"norm, {self.stage}", "norm, summed"]
        names.append(f"update, {self.stage}")
        if kind == VALIDATION:
            names = [f"{kind} of a rank", f"{kind}, summed", f"{kind}, mean"]
        return [(name, when) for name in names]

    def checkpoint(self) -> Iterator[Boundary]:
        """Everything that saving reads; a program only where it needs one."""
        with self.tracer.zero_reads():
            for _ in self.state.optimizer.owned():
                pass
            if self.state.spikes is not None:
                self.state.spikes.state()
        self.programs.expect([(CHECKPOINT, "between steps")])
        self.programs.step_boundary()
        yield from (each for each in self.programs.recorded if each.text)


class Programs:
    """The device of a traced run: it records the program that each boundary would compile."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.expect(())

    def expect(self, names: Sequence[tuple[str, str]]) -> None:
        """Forget what is recorded; the next boundaries are these: (kind, when in the run)."""
        self.names, self.recorded = iter(names), list[Boundary]()
        self.began = time.perf_counter()

    def step_boundary(self) -> None:
        """Record a program; its trace took from the boundary before."""
        kind, when = next(self.names)
        text = self.tracer.record()
        now = time.perf_counter()
        self.recorded.append(Boundary(kind, when, text, now - self.began))
        self.began = now

    def fetch(self, tensors: Sequence[Tensor]) -> list[float]:
        raise AssertionError("what is traced is not computed")

    def fetch_from_here(self) -> Callable[[Sequence[Tensor]], list[float]]:
        return self.fetch


@contextmanager
def made_up_tokens(run: ResolvedRun) -> Iterator[Path]:
    """A token file that fills a microbatch of every data rank, and half of the next."""
    data = run.config.data
    samples = 3 * data.micro_batch * run.mesh.dp // 2 + 1
    tokens = np.zeros(samples * data.sequence_length - data.sequence_length // 2, np.uint16)
    with tempfile.TemporaryDirectory(prefix="llamax-") as folder:
        path = Path(folder, "train.tokens")
        with TokenWriter(path, Header("", run.config.model.vocab_size)) as writer:
            writer.add(tokens, np.array([len(tokens)]), 0)
        yield path


def hashes(run: ResolvedRun) -> dict[str, str]:
    """Kind of program -> sha256 of its normal text, of those that the run compiles."""
    tracer = Tracer(rendezvous({}), debug=False)
    with made_up_tokens(run) as data:
        found = {
            boundary.kind: hlo.digest(hlo.normal(boundary.text))
            for rank in first_ranks(run)
            for boundary in TracedRun(run, rank, tracer, data).brief()
        }
    if run.config.run.validates:
        return found
    return {kind: each for kind, each in found.items() if not kind.startswith(VALIDATION)}


def first_ranks(run: ResolvedRun) -> list[int]:
    """The first rank of each stage that has programs of its own: of equal middle ones the first."""
    counts, stages = run.chunk_layers, run.mesh.pp
    alike: dict[tuple[ChunkKind, ...], int] = {}
    for stage in range(stages):
        alike.setdefault(tuple(chunk_kinds(counts, Seat(stage, stages))), stage)
    return [run.mesh.rank(Coordinate(stage, 0, 0, 0)) for stage in alike.values()]


def main(argv: Sequence[str]) -> int:
    path, world, cores = argv
    config = load_config(path, (), int(world), within=None)
    print(json.dumps(hashes(resolve(config, int(world)).on_trn1(int(cores)))))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
