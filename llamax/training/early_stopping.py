"""Early stopping: a run ends when its validation loss has not fallen for so many validations.

::

    validation   2.1  1.9  1.8  1.82  1.85        patience 2: the run ends here
    waited        0    0    0    1     2

All ranks hold the same loss, so they end together.  The count goes into every checkpoint, so a
resumed run ends where an unbroken one would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llamax.runtime.errors import CheckpointError
from llamax.training.step_result import Step

WAITED = "validations_waited"


class EarlyStopping:
    """Counts validations without improvement.

    ``most`` validations end the run, 0: none.  ``state`` is the ``state()`` of an earlier part of
    the run.  Raises CheckpointError if it is damaged.
    """

    def __init__(self, most: int, state: Mapping[str, Any]) -> None:
        self.most = most
        best, waited = state.get("best_validation_loss", math.inf), state.get(WAITED, 0)
        known = type(best) is float or (type(best) is int and abs(best) < 2**63)
        if not known or type(waited) is not int or waited < 0:
            raise CheckpointError(
                f"the checkpoint to resume has best_validation_loss={best!r:.40} and "
                f"{WAITED}={waited!r:.40}, which are not numbers; resume another one"
            )
        self.best, self.waited = float(best), waited

    @property
    def over(self) -> bool:
        """Whether the run should end."""
        return 0 < self.most <= self.waited

    def add(self, step: Step) -> int | None:
        """How many validations in a row were no better, that of ``step`` included.

        Without ``most`` they are not counted, and the answer is None.  Waits for the device, as
        nothing else in the loop.
        """
        if not self.most:
            return None
        loss = step.result.validation_loss
        assert loss is not None, "called after a validation"
        better = loss < self.best
        self.best, self.waited = min(self.best, loss), 0 if better else self.waited + 1
        return self.waited

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        if not self.most or math.isinf(self.best):
            return {}
        return {"best_validation_loss": self.best, WAITED: self.waited}
