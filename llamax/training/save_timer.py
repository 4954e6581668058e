"""Saving by time: rank 0's clock asks for a checkpoint, and all ranks save after the same step.

Clocks of different nodes never agree, so only rank 0 looks at its own.  Its request travels with
the requests to stop, in the all-reduce of the step, and is read one step later::

    step       n                     n + 1                    n + 2
    rank 0     interval over: asks   request is read: save    ...
    rank 1     asks nothing          request is read: save    ...
"""

from __future__ import annotations

import time
from collections.abc import Callable


class SaveTimer:
    """Asks for a checkpoint ``minutes`` after the last one; 0: never.

    ``clock`` gives seconds that never go back.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.interval_s, self.clock = 60.0 * minutes, clock
        self.since_s = clock()

    def due(self) -> bool:
        """Whether the interval is over; if so, the next one begins."""
        if not self.interval_s or self.clock() - self.since_s < self.interval_s:
            return False
        self.restart()
        return True

    def restart(self) -> None:
        """Begin an interval: a checkpoint is being saved, for whatever reason."""
        self.since_s = self.clock()
