"""Makes the records of a run, each while the next step runs.

The device is never waited for: the numbers of step n stay on it, and are fetched and written while
step n + 1 runs.  Throughput counts training steps alone, not validation or saving between them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from llamax.config.flops import mfu
from llamax.runtime.units import tokens_per_s
from llamax.training.console import ConsoleWriter
from llamax.training.metrics import Record, Writer
from llamax.training.step_result import Step


@dataclass(frozen=True)
class Throughput:
    """What throughput and memory are computed from.

    ``memory`` gives the peak of this rank in bytes, ``step_tokens`` is the size of a global batch,
    ``flops_per_token`` counts forward and backward, ``peak_flops`` is the FLOP/s of all ranks
    together, 0 where unknown.
    """

    memory: Callable[[], int]
    step_tokens: int
    flops_per_token: int
    peak_flops: float


class Recorder:
    """Writes a record to ``writers`` for each reported and each skipped step; flushes at its end.

    ``began``: when the run started, in ``time.perf_counter`` seconds.  ``samples`` gives the sample
    ids of a step, for the records of skipped ones; ``rewinds``: how often the run has gone back.
    """

    def __init__(
        self,
        writers: Iterable[Writer],
        throughput: Throughput,
        began: float,
        samples: Callable[[int], Sequence[int]] = lambda step: (),
        rewinds: int = 0,
    ) -> None:
        self.writers, self.throughput, self.began = tuple(writers), throughput, began
        self.samples, self.rewinds = samples, rewinds
        consoles = (writer for writer in self.writers if isinstance(writer, ConsoleWriter))
        self.console = next(consoles, None)
        self.steps, self.busy_s = 0, 0.0  # since the last record
        self.pending: Callable[[], Record | None] | None = None

    def took(self, seconds: float) -> None:
        """Count a training step, and write the record that waits for it."""
        self.steps, self.busy_s = self.steps + 1, self.busy_s + seconds
        self.flush()
        if self.console:
            self.console.stepped(seconds)

    def add(
        self,
        step: Step,
        consumed_tokens: int,
        lr: float,
        reported: bool = True,
        waited: int | None = None,
    ) -> None:
        """Keep a step for its record, which is written when the next one runs.

        A step that is not ``reported`` has a record only if it was skipped.  ``waited``: how many
        validations in a row were no better, this one included.
        """
        throughput, step_s = self.throughput, self.busy_s / self.steps
        seconds = time.perf_counter() - self.began
        rate = tokens_per_s(throughput.step_tokens, step_s)
        if reported:
            self.steps, self.busy_s = 0, 0.0

        def record() -> Record | None:
            result = step.result
            skipped = result.skipped and not result.overflowed
            if not (reported or skipped):
                return None
            scale = result.loss_scale
            return Record(
                step=result.number,
                consumed_tokens=consumed_tokens,
                seconds=seconds,
                step_s=step_s,
                loss=result.loss,
                grad_norm=result.grad_norm,
                lr=lr,
                tokens_per_s=rate,
                mfu=mfu(rate, throughput.flops_per_token, throughput.peak_flops),
                memory_bytes=throughput.memory(),
                validation_loss=result.validation_loss,
                validations_waited=waited,
                loss_scale=scale.scale if scale else None,
                overflowed_steps=scale.overflowed_steps if scale else None,
                skipped_samples=[*self.samples(result.number)] if skipped else None,
                rewinds=self.rewinds or None,
                metrics=dict(result.metrics) or None,
            )

        self.pending = record

    def doing(self, what: str) -> AbstractContextManager[None]:
        """Show on the console what happens between two steps."""
        return self.console.doing(what) if self.console else nullcontext()

    def flush(self) -> None:
        """Write the pending record, if any."""
        if self.pending is not None:
            record, self.pending = self.pending(), None
            if record is not None:
                for writer in self.writers:
                    writer.write(record)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.flush()
        finally:
            for writer in self.writers:
                writer.close()
