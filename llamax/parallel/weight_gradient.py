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
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import Parameter

from llamax import ops

BLOCK_BYTES = 4 * 2**20  # of an embedding's gradient: fits where an activation was

# What the backward that is running does with the gradient of a weight.
Use = Literal["accumulated", "returned", "unused"]

Additions = list[Callable[[], None]]

# What postpones the additions of a forward pass, if anything does.
_postponed: ContextVar[Additions | None] = ContextVar("postponed", default=None)


@dataclass(frozen=True)
class GradientSum:
    """Where the gradient of ``weight`` is summed: in ``total``, or if None in ``weight.grad``.

    Without a total, rows that were looked up are summed in ``blocks`` of the weight's rows, end to
    end.  The gradient of an embedding comes last in backward, when the memory of activations is
    free but in pieces: none takes it whole, and the heap would grow by it.
    """

    weight: Parameter
    total: Tensor | None
    blocks: list[Tensor] = field(default_factory=list)

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
        ids, rows = ids.flatten(), dy.flatten(0, -2)
        if self.total is not None:
            self.total.index_add_(0, ids, rows.to(self.total.dtype))
            return
        if not self.blocks:
            size = max(1, BLOCK_BYTES // self.weight[0].nbytes)
            self.blocks.extend(torch.zeros_like(part) for part in self.weight.split(size))
        first = 0
        for block in self.blocks:
            here = (ids >= first) & (ids < first + len(block))
            block.index_add_(0, ids[here] - first, rows[here])
            first += len(block)

    @torch.no_grad()
    def parts(self) -> list[Tensor]:
        """What is summed without a total, as flat vectors, end to end; empty if there is nothing.

        Valid until more is added.
        """
        grad = self.weight.grad
        if not self.blocks:
            return [] if grad is None else [grad.reshape(-1)]
        if grad is not None:
            for block, more in zip(self.blocks, grad.split(len(self.blocks[0])), strict=True):
                block.add_(more)
            self.weight.grad = None
        return [block.view(-1) for block in self.blocks]

    def clear(self) -> None:
        """Drop what is summed without a total."""
        self.weight.grad = None
        self.blocks.clear()


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
