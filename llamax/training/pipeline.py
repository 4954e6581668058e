"""Runs a stage's part of a schedule over the microbatches of a step; without a pipeline, all of it.

::

    forward     x from the stage below --> compute --> y, for the stage above    a program
    backward    dy from the stage above --> autograd --> dx, for the stage below a program
    swap        y and dx change places with the neighbours' dx and y             a program

The last forward ends in the loss, and its backward follows at once, in the same program.  A
microbatch in flight is what autograd keeps of it.  The schedule is data that depends on the number
of stages, chunks and microbatches alone (``llamax.parallel.pipeline``), so no value steers it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from llamax.backends.base import EAGER
from llamax.model.dropout import Dropout
from llamax.parallel.collectives import Axes, Axis, Reduction
from llamax.parallel.pipeline import Micro, Schedule, Swap, Work, back, onward

# (microbatch, x_BsD or None before the first layer) -> y_BsD, or the loss after the last layer
Compute = Callable[[Micro, Tensor | None], Tensor]


class InFlight(NamedTuple):
    """A microbatch between its passes: input, output, and the tokens that dropout tells apart."""

    x: Tensor | None
    y: Tensor
    dropout_tokens: Tensor | None


class _Way:
    """What travels up or down through the stages: at hand, and about to leave.

    Both by the microbatch at the chunk that receives it.
    """

    def __init__(self) -> None:
        self.arrived: dict[Micro, Tensor] = {}
        self.leaving: dict[Micro, Tensor] = {}


class Stage:
    """One rank's stage of a pipeline, of so many ``chunks``.

    ``boundary`` ends a program.  ``dropout`` is the model's, which has to know the microbatch again
    where backward computes layers again.
    """

    def __init__(
        self,
        axes: Axes,
        boundary: Callable[[], None],
        dropout: Dropout | None = None,
        chunks: int = 1,
    ) -> None:
        self.axes, self.boundary, self.dropout, self.chunks = axes, boundary, dropout, chunks
        self.number, self.stages = axes.pp
        self.first, self.last = self.number == 0, self.number == self.stages - 1
        self.most = 0  # microbatches in flight at the same time so far
        self._flying: dict[Micro, InFlight] = {}
        self._unused: Tensor | None = None

    def run(self, works: Schedule, compute: Compute, like: Tensor) -> None:
        """Do ``works``; ``like`` has the shape and dtype of what travels, [B,s,D].

        Without gradients the schedule has forward passes alone.  No name here keeps a tensor from
        one work to the next: what is alive is part of a program.
        """
        up, down = _Way(), _Way()
        for work, following in pairwise([*works, None]):
            if isinstance(work, Swap):
                above = work.edge == self.number
                way, other = (up, down) if above else (down, up)
                sent, received = (work.up, work.down) if above else (work.down, work.up)
                result = self._swap(self.axes.edge(work.edge), way, sent, other, received, like)
                self.boundary()
                del result  # alive until here, or there would be no program where it is not used
            elif isinstance(work, Work) and work.kind == "forward":
                self._forward(work.micro, up, compute)
                if following != Work("backward", work.micro):
                    self.boundary()
            elif isinstance(work, Work):
                self._backward(work.micro, down)
                self.boundary()

    def _swap(
        self,
        axis: Axis,
        way: _Way,
        sent: Micro | None,
        other: _Way,
        received: Micro | None,
        like: Tensor,
    ) -> Tensor:
        """Give what leaves on one way, and take what arrives on the other."""
        x = self._nothing(like) if sent is None else way.leaving.pop(sent)
        x = swap(axis, x)
        if received is not None:
            other.arrived[received] = x
        return x

    def _forward(self, micro: Micro, up: _Way, compute: Compute) -> None:
        starts = self.first and micro.chunk == 0
        x_BsD = None if starts else up.arrived.pop(micro)
        if not torch.is_grad_enabled():
            y = compute(micro, x_BsD)
        else:
            x_BsD = None if x_BsD is None else x_BsD.detach().requires_grad_()
            y = compute(micro, x_BsD)
            tokens = None if self.dropout is None else self.dropout.tokens_BS
            self._flying[micro] = InFlight(x_BsD, y, tokens)
            self.most = max(self.most, len(self._flying))
        if above := onward(micro, self.number, self.stages, self.chunks):
            up.leaving[above] = y.detach()

    def _backward(self, micro: Micro, down: _Way) -> None:
        passed = self._flying.pop(micro)
        if self.dropout is not None:
            self.dropout.tokens_BS = passed.dropout_tokens
        ends = self.last and micro.chunk == self.chunks - 1
        passed.y.backward(None if ends else down.arrived.pop(micro))
        if below := back(micro, self.number):
            assert passed.x is not None
            assert passed.x.grad is not None
            down.leaving[below] = passed.x.grad

    def _nothing(self, like: Tensor) -> Tensor:
        """What is given in a swap where nothing is to be sent."""
        if self._unused is None or self._unused.shape != like.shape:
            device = self.axes.world.rank_index.device
            self._unused = torch.zeros(like.shape, dtype=like.dtype).to(device)
        return self._unused


def swap(axis: Axis, x: Tensor) -> Tensor:
    """What the other rank of an axis of two gives for ``x``: [...] -> [...].

    Devices that trace programs gather both and pick by a tensor, so that both run one program.
    """
    if x.device.type in EAGER:
        return axis.shift(x)
    both = axis.all_gather(x.unsqueeze(0), 0)
    return both.index_select(0, 1 - axis.rank_index).squeeze(0)


class Apart:
    """An axis with sums that are programs of their own, common to ranks whose programs differ."""

    def __init__(self, axis: Axis, boundary: Callable[[], None]) -> None:
        self.axis, self.boundary = axis, boundary
        self.name, self.size, self.rank = axis.name, axis.size, axis.rank
        self.rank_index = axis.rank_index

    def all_reduce(self, x: Tensor, op: Reduction = "sum") -> Tensor:
        x = x.clone()
        self.boundary()
        y = self.axis.all_reduce(x, op)
        self.boundary()
        return y

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return self.axis.all_gather(x, dim)

    def start_all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        return self.axis.start_all_gather(x)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        return self.axis.reduce_scatter(x, dim)

    def all_to_all(self, x: Tensor, split: int, concat: int) -> Tensor:
        return self.axis.all_to_all(x, split, concat)

    def shift(self, x: Tensor, by: int = 1) -> Tensor:
        return self.axis.shift(x, by)


def apart(axes: Axes, boundary: Callable[[], None]) -> Axes:
    """The axes of a stage: where its programs differ from other stages', common sums are apart."""
    if axes.pp.size == 1 or axes.world.rank_index.device.type in EAGER:
        return axes
    return replace(axes, world=Apart(axes.world, boundary), ends=Apart(axes.ends, boundary))
