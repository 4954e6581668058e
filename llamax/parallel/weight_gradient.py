"""Gradients of weights, added in one product to where they are summed, at once or later.

Autograd makes the gradient of each microbatch as a tensor of its own, and then adds it.  Where an
optimizer names the sum of a weight, its layer multiplies right into it instead::

    sum += dy^T x         Megatron-LM calls this gradient accumulation fusion

Nothing else in backward waits for this product, so that a stage of a pipeline may also postpone it:
it sends the gradient of its input first (Qi et al. 2023, "Zero Bubble Pipeline Parallelism").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from llamax import ops

Additions = list[Callable[[], None]]

# What postpones the additions of a forward pass, if anything does.
_postponed: ContextVar[Additions | None] = ContextVar("postponed", default=None)


@dataclass(frozen=True)
class GradientSum:
    """Where the gradient of ``weight`` is summed: in ``total``, or if None in ``weight.grad``."""

    weight: Parameter
    total: Tensor | None

    @property
    def open(self) -> bool:
        """Whether products may add to it: no hook wants to see the gradient."""
        return not self.weight._backward_hooks

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
