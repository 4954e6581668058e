"""Runs a stage's part of a schedule over the microbatches of a step; without a pipeline, all of it.

::

    forward     x from the stage below --> compute --> y, for the stage above    a program
    backward    dy from the stage above --> autograd --> dx, for the stage below a program
    swap        y and dx change places with the neighbours' dx and y             a program
    weights     gradients of weights that backward has put off, during a swap (eager devices)

The last forward ends in the loss, and its backward follows at once, in the same program.  A
microbatch in flight is what autograd keeps of it.  The schedule is data that depends on the number
of stages, chunks and microbatches alone (``llamax.parallel.pipeline``), so no value steers it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamax.backends.transfer import sent
from llamax.config.choices import EAGER_BACKENDS
from llamax.model.dropout import Dropout
from llamax.parallel import regions
from llamax.parallel.collectives import Axes, Axis, Reduction
from llamax.parallel.pipeline import Micro, Schedule, Swap, Work, back, onward
from llamax.parallel.weight_gradient import Additions, postponing

# (microbatch, x_BsD or None before the first layer) -> y_BsD, or the loss after the last layer
Compute = Callable[[Micro, Tensor | None], Tensor]


class InFlight(NamedTuple):
    """A microbatch between its passes: input, output, and the tokens that dropout tells apart.

    ``later``: the gradients of weights that its backward puts off.
    """

    x: Tensor | None
    y: Tensor
    dropout_tokens: Tensor | None
    later: Additions


class _Way:
    """What travels up or down through the stages: at hand, and about to leave.

    Both by the microbatch at the chunk that receives it.
    """

    def __init__(self) -> None:
        self.arrived: dict[Micro, Tensor] = {}
        self.leaving: dict[Micro, Tensor] = {}


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, torch.ones((), device=dy.device)


def with_loss(y: Tensor, loss: Tensor) -> Tensor:
    """y, whose backward is that of a ``loss`` of this stage as well: float32, 0-d."""
    return regions.apply(_WithLoss, y, loss)


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
        self._later: dict[Micro, Additions] = {}
        self._unused: Tensor | None = None

    def run(self, works: Schedule, compute: Compute, like: Tensor) -> None:
        """Do ``works``; ``like`` has the shape and dtype of what travels, [B,s,D].

        Without gradients the schedule has forward passes alone.  No name here keeps a tensor from
        one work to the next: what is alive is part of a program.
        """
        up, down = _Way(), _Way()
        split = any(map(_is_put_off, works))
        swapped: Callable[[], Tensor] | None = None
        for work, following in pairwise([*works, None]):
            match work:
                case Swap():
                    swapped = self._swap(work, up, down, like)
                case Work("forward", micro):
                    self._forward(micro, up, compute, split)
                    if following != Work("backward", micro):
                        self.boundary()
                case Work("backward", micro):
                    self._backward(micro, down)
                    self.boundary()
                case Work("weights", micro):
                    self._weights(micro)
            if swapped and not _is_put_off(following):
                result, swapped = swapped(), None
                self.boundary()
                del result  # alive until here, or there would be no program where it is not used

    def _swap(self, swap: Swap, up: _Way, down: _Way, like: Tensor) -> Callable[[], Tensor]:
        """Begin to give what leaves over an edge; the function takes what arrives there."""
        above = swap.edge == self.number  # the other rank is one of the stage above
        way, other = (up, down) if above else (down, up)
        sent, received = (swap.up, swap.down) if above else (swap.down, swap.up)
        x = self._nothing(like) if sent is None else way.leaving.pop(sent)
        wait = start_swap(self.axes.edge(swap.edge), x)

        def taken() -> Tensor:
            x = wait()
            if received is not None:
                other.arrived[received] = x
            return x

        return taken

    def _forward(self, micro: Micro, up: _Way, compute: Compute, split: bool) -> None:
        starts = self.first and micro.chunk == 0
        x_BsD = None if starts else up.arrived.pop(micro)
        if not torch.is_grad_enabled():
            y = compute(micro, x_BsD)
        else:
            later = Additions()
            x_BsD = None if x_BsD is None else x_BsD.detach().requires_grad_()
            with postponing(later) if split else nullcontext():
                y = compute(micro, x_BsD)
            tokens = None if self.dropout is None else self.dropout.tokens_BS
            self._flying[micro] = InFlight(x_BsD, y, tokens, later)
            self.most = max(self.most, len(self._flying))
        if above := onward(micro, self.number, self.stages, self.chunks):
            up.leaving[above] = y.detach()

    def _backward(self, micro: Micro, down: _Way) -> None:
        passed = self._flying.pop(micro)
        if self.dropout is not None:
            self.dropout.tokens_BS = passed.dropout_tokens
        ends = self.last and micro.chunk == self.chunks - 1
        dy = None if ends else down.arrived.pop(micro)
        if passed.y.requires_grad:  # the first chunk may be frozen
            passed.y.backward(dy)
        if below := back(micro, self.number):
            assert passed.x is not None
            assert passed.x.grad is not None
            down.leaving[below] = passed.x.grad
        if passed.later:
            self._later[micro] = passed.later

    def _weights(self, micro: Micro) -> None:
        """Add the gradients of weights that the backward of ``micro`` has put off, if any."""
        later = self._later.pop(micro, Additions())
        while later:
            later.pop(0)()

    def _nothing(self, like: Tensor) -> Tensor:
        """What is given in a swap where nothing is to be sent."""
        if self._unused is None or self._unused.shape != like.shape:
            device = self.axes.world.rank_index.device
            self._unused = sent(torch.zeros(like.shape, dtype=like.dtype), device)
        return self._unused


def _is_put_off(work: Work | Swap | None) -> bool:
    """Whether this is the gradient of weights that a backward has put off."""
    return isinstance(work, Work) and work.kind == "weights"


def start_swap(axis: Axis, x: Tensor) -> Callable[[], Tensor]:
    """Begin a swap over an axis of two; the function waits for what the other rank gives for ``x``.

    Devices that trace programs gather both and pick by a tensor, so that both run one program.
    """
    if x.device.type in EAGER_BACKENDS:
        return axis.start_shift(x)
    both = axis.all_gather(x.unsqueeze(0), 0)
    picked = both.index_select(0, 1 - axis.rank_index).squeeze(0)
    return lambda: picked


class Apart:
    """An axis with sums that are programs of their own, common to ranks whose programs differ.

    In everything else it is ``axis``.
    """

    def __init__(self, axis: Axis, boundary: Callable[[], None]) -> None:
        self.axis, self.boundary = axis, boundary

    def __getattr__(self, name: str) -> Any:
        return getattr(self.axis, name)

    def all_reduce(self, x: Tensor, op: Reduction = "sum") -> Tensor:
        x = x.clone()
        self.boundary()
        y = self.axis.all_reduce(x, op)
        self.boundary()
        return y


def apart(axes: Axes, boundary: Callable[[], None]) -> Axes:
    """The axes of a stage: where its programs differ from other stages', common sums are apart."""
    if axes.pp.size == 1 or axes.world.rank_index.device.type in EAGER_BACKENDS:
        return axes
    world, ends = (cast(Axis, Apart(axis, boundary)) for axis in (axes.world, axes.ends))
    return replace(axes, world=world, ends=ends)
