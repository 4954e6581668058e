"""What all ranks conclude alike from a step: go on, skip, or stop.

A step sums over the world, in one all-reduce, its loss and the ranks' wishes to stop; its gradient
norm is a sum over the world as well.  So each rank holds the same three numbers, and what follows
from them needs no further exchange.  They are fetched while the next step runs::

    step       n                n + 1            n + 2
    rank 1     SIGTERM comes    wish enters      stop is read: save n + 2, end
    rank 0                      0 enters         stop is read: save n + 2, end
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from llamax.runtime.errors import NotFinite
from llamax.runtime.logging import logger
from llamax.training.step import Step


class StepCheck:
    """Judges steps, each while the next one runs; the same on every rank.

    ``fetch``: device values to floats; ``most_skipped``: steps without a finite loss and gradient
    that may follow each other; ``samples``: the sample ids of a step's global batch; ``tells``:
    whether this rank warns of a skipped step.
    """

    def __init__(
        self,
        fetch: Callable[[Sequence[Tensor]], list[float]],
        most_skipped: int,
        samples: Callable[[int], Sequence[int]],
        tells: bool = True,
    ) -> None:
        self.fetch, self.most_skipped, self.samples = fetch, most_skipped, samples
        self.tells = tells
        self.skipped = 0
        self.pending: tuple[int, Step] | None = None

    def add(self, step: int, found: Step) -> bool:
        """Judge what is pending and keep ``step`` for later: whether some rank wishes to stop.

        Raises NotFinite where more than ``most_skipped`` steps in a row were skipped.
        """
        stop = self.judge()
        self.pending = step, found
        return stop

    def judge(self) -> bool:
        """Judge what is pending, as ``add`` does."""
        if self.pending is None:
            return False
        (step, found), self.pending = self.pending, None
        loss, grad_norm, stop = self.fetch([found.loss, found.grad_norm, found.stop])
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.skipped = 0
            return stop > 0
        self.skipped += 1
        ids = ", ".join(map(str, self.samples(step)))
        what = f"step {step}: loss {loss}, gradient norm {grad_norm}: no rank made an update"
        if self.tells:
            logger.warning("%s; samples %s", what, ids)
        if self.skipped > self.most_skipped:
            raise NotFinite(
                f"{what}, {self.skipped} in a row; look at samples {ids}, lower optim.lr, or "
                f"raise optim.most_skipped={self.most_skipped}"
            )
        return stop > 0
