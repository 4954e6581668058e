"""Sums of gradients over ranks that go on while backward computes the next ones.

::

    computed    dW2       dW1        dW0
    summed       └─ dW2 ──┴─ dW1 ───┴─ dW0 ─┐
                                             └ backward ends with the last one

FSDP overlaps the same way (Zhao et al. 2023, section 3.3.1).  One sum is under way at a time, so
that at most one gradient more is whole than without it.  All ranks begin the same sums in the same
order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Variable

from llamax.config.choices import EAGER_BACKENDS


class Reductions:
    """The sums of one backward after another; each is complete when its backward returns."""

    def __init__(self) -> None:
        self._started: tuple[Tensor, Callable[[], Tensor]] | None = None

    def add(self, total: Tensor, start: Callable[[], Callable[[], Tensor]]) -> None:
        """Begin a sum by ``start``, which returns a wait for it, and later add it to ``total``.

        Outside of a backward it is added at once, and where programs are traced: their compiler
        decides what goes on at the same time.
        """
        self.finish()
        self._started = total, start()
        traced = total.device.type not in EAGER_BACKENDS
        if traced or torch._C._current_graph_task_id() < 0:
            self.finish()
        else:
            Variable._execution_engine.queue_callback(self.finish)

    @torch.no_grad()
    def finish(self) -> None:
        """Add the sum that is under way, if there is one."""
        if self._started is not None:
            (total, wait), self._started = self._started, None
            total.add_(wait())
