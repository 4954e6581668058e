"""Where the gradients of a group are summed over microsteps, and when over the data ranks.

::

    Autograd     parameter.grad, or blocks of an embedding's rows: float32 that is never sent
    Accumulated  += whole gradients, float32 ──> the optimizer step sums them          ZeRO-0, 1
    Reduced      backward ──> gradients of a bucket complete
                          ── reduce-scatter ──> += [ shard ], float32                  ZeRO-2
    Sharded      backward of a layer ── reduce-scatter ──> += [ shard ], float32       ZeRO-3

Rajbhandari et al. 2020, sections 5.2 and 5.3.  With ZeRO-2 and 3 each microstep sends what ZeRO-1
sends once a step.  Shards that several ranks keep are summed over these once a step, as in ZeRO-1.
``llamax.parallel.fsdp`` gathers the weights of ZeRO-3, and sums their gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from llamax.optim.buckets import Piece, pieces
from llamax.optim.layouts import Flat, Separate, is_eager, joined
from llamax.optim.state import Bucket
from llamax.parallel.collectives import Axis
from llamax.parallel.reductions import Reductions
from llamax.parallel.weight_gradient import GradientSum


class Gradients(ABC):
    """The gradients of a group; ``stored`` are the float32 tensors that microsteps add to.

    ``sums``, if any, are where layers may add gradients themselves, one for each parameter.
    """

    stored: Sequence[Tensor] = ()
    sums: Sequence[GradientSum] = ()

    @abstractmethod
    def of(self, bucket: Bucket) -> list[Tensor]:
        """The bucket's gradient, in flat parts, for an optimizer step; it may be overwritten."""

    def whole(self, member: int) -> Tensor | None:
        """The gradient of a parameter, by its place; None where there is none, or only a shard."""
        return None

    def finish(self) -> None:  # noqa: B027, most send nothing
        """Send what backward has left unsent, before an optimizer step."""

    def clear(self) -> None:
        """Set the gradients to zero."""
        for gradient in self.stored:
            gradient.zero_()


class Autograd(Gradients):
    """Gradients that the parameters keep."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.parameters = parameters
        self.sums = [GradientSum(parameter, None) for parameter in parameters]

    def of(self, bucket: Bucket) -> list[Tensor]:
        """Take the gradient from the parameters, and clear it there."""
        taken = []
        for member, start, stop, _ in bucket.pieces:
            total, parameter = self.sums[member], self.parameters[member]
            parts = total.parts() or [parameter.new_zeros(parameter.numel())]
            for number, low, high, _ in pieces([*map(len, parts)], start, stop):
                taken.append(parts[number][low:high])
            if stop == parameter.numel():
                total.clear()
        return taken

    def whole(self, member: int) -> Tensor | None:
        parts = self.sums[member].parts()
        return torch.cat(parts).view(self.parameters[member].shape) if parts else None

    def clear(self) -> None:
        for total in self.sums:
            total.clear()


class Accumulated(Gradients):
    """Whole gradients, each added in float32 to its tensor in ``layout`` and freed."""

    def __init__(self, parameters: Sequence[Parameter], layout: Flat | Separate) -> None:
        self.parameters, self.layout, self.stored = parameters, layout, layout.stored
        self.sums = [*map(GradientSum, parameters, layout.tensors)]
        for member, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, member))

    def _arrived(self, member: int, parameter: Tensor) -> None:
        if parameter.grad is not None:  # the layer has not added it
            self.layout.tensors[member].add_(parameter.grad)
            parameter.grad = None

    def of(self, bucket: Bucket) -> list[Tensor]:
        return [self.layout.of(bucket)]

    def whole(self, member: int) -> Tensor | None:
        return self.layout.tensors[member]

    def clear(self) -> None:
        super().clear()
        for parameter in self.parameters:
            parameter.grad = None


class Sharded(Gradients):
    """This rank's shard of each bucket; the layer whose weight it is sums gradients into it."""

    def __init__(self, shards: Sequence[Tensor]) -> None:
        self.stored = shards

    def of(self, bucket: Bucket) -> list[Tensor]:
        return [self.stored[bucket.number]]


class Reduced(Sharded):
    """Shards of gradients that are summed over ``shard`` in backward, bucket by bucket.

    A bucket is sent when backward has made the gradients of all its members.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        buckets: Sequence[Bucket],
        shards: Sequence[Tensor],
        shard: Axis,
        reductions: Reductions,
    ) -> None:
        super().__init__(shards)
        self.buckets, self.shard, self.reductions = buckets, shard, reductions
        self._unsent: list[dict[int, Tensor]] = [{} for _ in buckets]  # gradients by member
        self._pieces_of: list[list[tuple[Bucket, Piece]]] = [[] for _ in parameters]
        for bucket in buckets:
            for piece in bucket.pieces:
                self._pieces_of[piece.member].append((bucket, piece))
        for member, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, member))

    def _arrived(self, member: int, parameter: Tensor) -> None:
        """Take a new gradient, and send the buckets that it completes."""
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad.reshape(-1), None
        if not is_eager(gradient):
            gradient = gradient.float()  # in a program at no cost; here it would take memory
        for bucket, piece in self._pieces_of[member]:
            unsent, part = self._unsent[bucket.number], gradient[piece.start : piece.stop]
            unsent[member] = unsent[member] + part if member in unsent else part
            if len(unsent) == len(bucket.pieces):
                self._send(bucket)

    @torch.no_grad()
    def _send(self, bucket: Bucket) -> None:
        """Add the bucket's shard of the sum over ``shard`` to the gradient."""
        unsent = self._unsent[bucket.number]
        whole = joined(bucket, unsent)
        unsent.clear()
        start = partial(self.shard.start_reduce_scatter, whole)
        self.reductions.add(self.stored[bucket.number], start)

    def finish(self) -> None:
        """Send the buckets of which some members had no gradient."""
        for bucket in self.buckets:
            if self._unsent[bucket.number]:
                self._send(bucket)

    def clear(self) -> None:
        super().clear()
        for unsent in self._unsent:
            unsent.clear()
