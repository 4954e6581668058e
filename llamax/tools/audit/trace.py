"""What one rank of a run would compile, step by step, through the functions that training uses.

A rehearsal takes the place of one rank: model and optimizer without memory, real batches of made-up
tokens, ``llamax.training.step`` as it is.  It visits every kind of step that a run has::

    step 1         first and second microstep, the last of the step, update
    validation     a full batch, and the ragged one that ends the file
    checkpoint     everything that saving reads
    step 2, N      first and last microstep, update

and gives, at each boundary, the program that would be compiled there.

``python -m llamax.tools.audit.trace RUN.toml WORLD CORES`` prints each kind of program and its
hash, as JSON, for ``llamax.tools.audit.compile_cache``.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llamax.backends.tracing import Tracer
from llamax.checkpoint.build_model import build_model
from llamax.config.load import load_config
from llamax.data.loader import Batch, Batches
from llamax.data.samples import Samples
from llamax.data.shuffle import Integers
from llamax.data.token_file import Header, TokenFile, TokenWriter
from llamax.optim import Zero1, lr_at
from llamax.parallel.rendezvous import rendezvous
from llamax.runtime.process import run_main
from llamax.tools.audit import hlo
from llamax.training.resolve import ResolvedRun, resolve
from llamax.training.setup import move_rest
from llamax.training.step import train_step, validation_loss

MICROSTEP, UPDATE, VALIDATION, CHECKPOINT = "microstep", "update", "validation", "checkpoint"


@dataclass(frozen=True)
class Boundary:
    """A place where a program ends: its kind, when in the run, its HLO text, how long it took."""

    kind: str
    when: str
    text: str
    trace_s: float


class TracedRun:
    """The pieces of a run on global ``rank``, as shapes."""

    def __init__(self, run: ResolvedRun, rank: int, tracer: Tracer, data: Path) -> None:
        self.run, self.tracer = run, tracer
        self.config = config = run.config
        self.axes = axes = tracer.axes(run.mesh, rank)
        self.model = build_model(config, None, False, axes, torch.device("meta"))
        self.optimizer = Zero1(
            self.model.sharded_parameters(),
            config.optim,
            axes,
            sequence_parallel=self.model.sequence_parallel,
            zero1=config.parallel.zero1,
            bucket_bytes=config.parallel.bucket_bytes,
        )
        self.optimizer.to(tracer.device)
        move_rest(self.model, tracer.device)
        tracer.clear_pending()
        self.training = Samples(TokenFile(data, "off"), config.data, config.run.seed).loader(
            axes.data, 0, shuffle=True
        )
        self.validation = Samples(TokenFile(data, "off"), config.data, config.run.seed).loader(
            axes.data, 0, shuffle=False
        )

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
        config = self.config
        batches = self.training.at((step - 1) * config.data.global_batch)
        chosen = sorted({place % len(batches) for place in microsteps})
        names = [f"step {step}, microstep {place + 1} of {len(batches)}" for place in chosen]
        found = _Found(self.tracer)

        def boundary() -> None:
            if len(found.boundaries) < len(names):
                found.add(MICROSTEP, names[len(found.boundaries)])
            else:
                found.add(UPDATE, f"step {step}, update")

        with self.tracer.forbid_reads():
            train_step(
                self.model,
                self.optimizer,
                self.axes,
                (batches[place] for place in chosen),
                self.run.step_tokens,
                lr_at(step, config.optim, self.run.steps),
                step,
                boundary=boundary,
            )
        yield from found.boundaries

    def validate(self, batches: int) -> Iterator[Boundary]:
        """Validation of a full microbatch and, of two, the ragged one that ends the file."""
        found = _Found(self.tracer)
        full, ragged = (self.validation.at(0) + self.validation.at(self.training.global_batch))[:2]

        def boundary() -> None:
            found.add(VALIDATION, f"{'ragged' if found.boundaries else 'full'} batch")

        with self.tracer.forbid_reads():
            validation_loss(
                self.model, self.axes, _Few([[full], [ragged]][:batches]), batches, boundary
            )
        yield from found.boundaries

    def checkpoint(self) -> Iterator[Boundary]:
        """Everything that saving reads; a program only where it needs one."""
        with self.tracer.zero_reads():
            for _ in self.optimizer.owned():
                pass
        found = _Found(self.tracer)
        found.add(CHECKPOINT, "between steps")
        yield from (each for each in found.boundaries if each.text)


class _Found:
    """Boundaries as they come; a trace takes from one to the next."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer, self.boundaries = tracer, list[Boundary]()
        self.began = time.perf_counter()

    def add(self, kind: str, when: str) -> None:
        text = self.tracer.record()
        now = time.perf_counter()
        self.boundaries.append(Boundary(kind, when, text, now - self.began))
        self.began = now


class _Few(Batches):
    """An epoch of given batches."""

    def __init__(self, batches: list[list[Batch]]) -> None:
        self.batches = batches

    def gather(self, samples: Integers) -> Batch:
        raise AssertionError("its batches are given")

    def epoch(self) -> Iterator[list[Batch]]:
        yield from self.batches


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
    """Kind of program -> sha256 of its normal text, of rank 0, of those that the run compiles."""
    tracer = Tracer(rendezvous({}), debug=False)
    with made_up_tokens(run) as data:
        found = {
            boundary.kind: hlo.digest(hlo.normal(boundary.text))
            for boundary in TracedRun(run, 0, tracer, data).brief()
        }
    if not run.config.run.validates:
        del found[VALIDATION]
    return found


def main(argv: Sequence[str]) -> int:
    path, world, cores = argv
    config = load_config(path, (), int(world))
    print(json.dumps(hashes(resolve(config, int(world)).on_trn1(int(cores)))))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
