"""Steps -> records, one step late.

The device is never waited for: what step n found stays on it, and is fetched and written while
step n + 1 runs.  Throughput counts training steps alone, not validation or saving between them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from llamax.config.flops import mfu
from llamax.runtime.units import tokens_per_s
from llamax.training.metrics import Record, Writer, Writers


@dataclass(frozen=True)
class Measures:
    """How device values reach the host, and what throughput is counted in.

    ``step_tokens``: tokens of a global batch; ``flops_per_token``: forward and backward;
    ``peak_flops``: FLOP/s of all ranks together, 0 where unknown.
    """

    fetch: Callable[[Sequence[Tensor]], list[float]]
    memory: Callable[[], int]
    step_tokens: int
    flops_per_token: int
    peak_flops: float


class Recorder:
    """Writes a record to ``writers`` for each step added; a context that flushes at its end.

    ``began``: when the run started, in ``time.perf_counter`` seconds.
    """

    def __init__(self, writers: Iterable[Writer], measures: Measures, began: float) -> None:
        self.writers, self.measures, self.began = Writers(writers), measures, began
        self.steps, self.busy_s = 0, 0.0  # since the last record
        self.pending: Callable[[], Record] | None = None

    def took(self, seconds: float) -> None:
        """Count a training step, and write the record that waits for it."""
        self.steps, self.busy_s = self.steps + 1, self.busy_s + seconds
        self.flush()

    def add(
        self,
        step: int,
        consumed_tokens: int,
        lr: float,
        found: Sequence[Tensor],
        validated: Tensor | None,
    ) -> None:
        """Keep [loss, gradient norm] of step ``step``, and its validation loss, until the next."""
        measures, step_s = self.measures, self.busy_s / self.steps
        seconds = time.perf_counter() - self.began
        rate = tokens_per_s(measures.step_tokens, step_s)
        self.steps, self.busy_s = 0, 0.0
        values = [*found, *([] if validated is None else [validated])]

        def record() -> Record:
            loss, grad_norm, *rest = measures.fetch(values)
            return Record(
                step=step,
                consumed_tokens=consumed_tokens,
                seconds=seconds,
                step_s=step_s,
                loss=loss,
                grad_norm=grad_norm,
                lr=lr,
                tokens_per_s=rate,
                mfu=mfu(rate, measures.flops_per_token, measures.peak_flops),
                memory_bytes=measures.memory(),
                validation_loss=rest[0] if rest else None,
            )

        self.pending = record

    def flush(self) -> None:
        """Write the pending record, if any."""
        if self.pending is not None:
            record, self.pending = self.pending(), None
            self.writers.write(record)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.flush()
        finally:
            self.writers.close()
