"""The check of every step, with the same result on all ranks: go on, skip, save, or stop.

A step sums over the world, in one all-reduce, its loss and the ranks' requests; its gradient norm
is a sum over the world as well.  So each rank holds the same three numbers, and what follows
from them needs no further exchange.  They are fetched, once, while the next step runs::

    step       n                n + 1            n + 2
    rank 1     SIGTERM comes    request enters   stop is read: save n + 2, end
    rank 0                      0 enters         stop is read: save n + 2, end
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llamax.runtime.errors import NotFinite
from llamax.runtime.logging import logger
from llamax.training.step_result import Step, StepResult

# In the state of a checkpoint: the number of steps skipped up to it, and the first of them.
SKIPPED_IN_A_ROW, SKIPPED_SINCE = "skipped_in_a_row", "skipped_since"


class StepCheck:
    """Checks each step while the next one runs; the same on every rank.

    A gradient that overflows in float16 is not counted while the loss scale is 1 or more.

    ``most_skipped`` is the number of skipped steps that may follow each other, ``skipped`` of them
    so far, from step ``first`` on, and ``rewind`` that after which the run goes back, 0 for never;
    ``samples`` gives the sample ids of a step's global batch, ``logs`` is whether this rank warns
    of a skipped step, ``last`` the step before the first one to check.
    """

    def __init__(
        self,
        most_skipped: int,
        samples: Callable[[int], Sequence[int]],
        logs: bool = True,
        skipped: int = 0,
        first: int = 0,
        rewind: int = 0,
        last: int = 0,
    ) -> None:
        self.most_skipped, self.samples, self.logs = most_skipped, samples, logs
        self.skipped, self.first, self.rewind = skipped, first, rewind
        self.last = last  # the last step that was checked
        self.stays = 0  # the ``first`` of a row for which there is no checkpoint to go back to
        self.save_requested = 0  # the last step in which rank 0 asked for a checkpoint
        self.pending: Step | None = None

    @property
    def rewind_due(self) -> bool:
        """Whether so many steps in a row were skipped that the run should go back."""
        return 0 < self.rewind <= self.skipped and self.stays != self.first

    def state(self, result: StepResult) -> dict[str, Any]:
        """What a checkpoint after the step that comes next keeps of a row of skipped steps."""
        skipped, first = self._counted(result)
        return {SKIPPED_IN_A_ROW: skipped, SKIPPED_SINCE: first} if skipped else {}

    def _counted(self, result: StepResult) -> tuple[int, int]:
        """``skipped`` and ``first`` after the step that comes next; no row is 0, 0."""
        if result.overflowed:
            return self.skipped, self.first
        return (self.skipped + 1, self.first or result.number) if result.skipped else (0, 0)

    def add(self, step: Step) -> bool:
        """Check the step before and keep ``step`` for later: whether some rank wants to stop.

        Raises NotFinite if more than ``most_skipped`` steps in a row were skipped.
        """
        stop = self.check()
        self.pending = step
        return stop

    def check(self) -> bool:
        """Check the step that is kept, if any, as ``add`` does."""
        if self.pending is None:
            return False
        result, self.pending = self.pending.result, None
        self.last = result.number
        if result.save:
            self.save_requested = result.number
        self.skipped, self.first = self._counted(result)
        if not result.skipped:
            return result.stop
        if result.overflowed:
            assert result.loss_scale is not None
            if self.logs:
                logger.info(
                    "step %d: a gradient overflowed in float16: no rank made an update, and the "
                    "loss scale is now %g",
                    result.number,
                    result.loss_scale.scale,
                )
            return result.stop
        ids = ", ".join(map(str, self.samples(result.number)))
        what = f"step {result.number}: {_reason(result)}: no rank made an update"
        if self.logs:
            logger.warning("%s; samples %s", what, ids)
        if self.skipped > self.most_skipped:
            remedy = "lower optim.lr" if result.labels else "raise data.global_batch"
            raise NotFinite(
                f"{what}, {self.skipped} in a row; look at samples {ids}, {remedy}, or "
                f"raise optim.most_skipped={self.most_skipped}"
            )
        return result.stop


def _reason(result: StepResult) -> str:
    """Why a step was skipped."""
    if not result.labels:
        return "none of its labels counts in the loss"
    numbers = {
        "loss": (result.loss, result.loss_bound),
        "gradient norm": (result.grad_norm, result.norm_bound),
    }
    if not all(math.isfinite(value) for value, _ in numbers.values()):
        return ", ".join(f"{name} {value}" for name, (value, _) in numbers.items())
    outliers = (
        f"{name} {value:.4f} is an outlier, above {bound:.4f}"
        for name, (value, bound) in numbers.items()
        if value > bound
    )
    return ", ".join(outliers)
