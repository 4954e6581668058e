"""Gradients of weights, added in one product to where they are summed, at once or later.

Autograd makes the gradient of each microbatch as a tensor of its own, and then adds it.  Where an
optimizer names the sum of a weight, its layer multiplies right into it instead, and on a CPU the
embedding adds the rows that were looked up::

    sum += dy^T x         Megatron-LM calls this gradient accumulation fusion
    sum[ids] += dy

Nothing else in backward waits for this product, so that a stage of a pipeline may also postpone it:
it sends the gradient of its input first (Qi et al. 2023, "Zero Bubble Pipeline Parallelism").

Only a backward that accumulates gradients adds to the sums: ``torch.autograd.grad`` returns those
that it is asked for, and leaves the sums alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import Parameter

from llamax import ops

# What the backward that is running does with the gradient of a weight.
Use = Literal["accumulated", "returned", "unused"]

Additions = list[Callable[[], None]]

# What postpones the additions of a forward pass, if anything does.
_postponed: ContextVar[Additions | None] = ContextVar("postponed", default=None)


@dataclass(frozen=True)
class GradientSum:
    """Where the gradient of ``weight`` is summed: in ``total``, or if None in ``weight.grad``."""

    weight: Parameter
    total: Tensor | None

    def use(self, node: Node) -> Use:
        """Accumulated: a product may add to it.  Returned: a hook or a caller wants the gradient.

        ``node`` accumulates the gradient of the weight; call it in a backward.
        """
        if self.weight._backward_hooks:
            return "returned"
        try:
            return "accumulated" if torch._C._will_engine_execute_node(node) else "unused"
        except RuntimeError:  # what torch has to say of a leaf that torch.autograd.grad asks for
            return "returned"

    @torch.no_grad()
    def add(self, dy: Tensor, x: Tensor) -> None:
        """Add the gradient of ``ops.linear(x, weight)``: [..., out], [..., in]."""
        total = self.weight.grad if self.total is None else self.total
        if total is None:
            self.weight.grad = ops.matmul_grad_weight(dy, x)
        elif total.dtype == ops.product_dtype(dy):
            rows, columns = (t.flatten(0, -2).to(total.dtype) for t in (dy, x))
            total.addmm_(rows.t(), columns)
        else:
            total.add_(ops.matmul_grad_weight(dy, x))

    @torch.no_grad()
    def add_rows(self, dy: Tensor, ids: Tensor) -> None:
        """Add the gradient of ``ops.embedding(ids, weight)``: [..., D], integers [...]."""
        total = self.weight.grad if self.total is None else self.total
        if total is None:
            total = self.weight.grad = torch.zeros_like(self.weight)
        total.index_add_(0, ids.flatten(), dy.flatten(0, -2).to(total.dtype))


@contextmanager
def postponing(additions: Additions) -> Iterator[None]:
    """Let the backward of what is computed in this block append its additions to ``additions``."""
    before = _postponed.set(additions)
    try:
        yield
    finally:
        _postponed.reset(before)


def postponed() -> Additions | None:
    """Where the backward of what is computed now appends its additions; None: it makes them."""
    return _postponed.get()
