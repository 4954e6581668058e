"""Groups that keep runs of more than the optimizer state: ZeRO-2 and ZeRO-3.

::

    ZeRO-2   backward ──> gradients of a bucket complete ── reduce-scatter ──> += [ run ], float32
    ZeRO-3   the same, a layer's weight at a time, whose weights are a run too:
             [ run ] ── gather ──> used in forward ── dropped, gathered again in backward

Rajbhandari et al. 2020, sections 5.2 and 5.3.  Each microstep sends what ZeRO-1 sends once a step.
Runs that several ranks keep are summed over these once a step, as in ZeRO-1.
``llamax.parallel.spread`` gathers the weights of ZeRO-3.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from llamax.optim.buckets import Segment
from llamax.optim.groups import Group, Key
from llamax.parallel.collectives import Axes, Axis
from llamax.parallel.placeholder import Placeholder
from llamax.parallel.reductions import Reductions
from llamax.parallel.sharding import Storing
from llamax.parallel.spread import SpreadWeight


class ReducedGroup(Group):
    """A group whose gradients are summed over ``shard`` in backward, each rank keeping its runs.

    A bucket is sent when backward has made the gradients of all its members.  Until then they stay
    in ``parameter.grad``, which holds what is not sent yet.
    """

    reduced = True

    def __init__(
        self,
        key: Key,
        members: Mapping[str, Parameter],
        counted: list[Segment],
        axes: Axes,
        shard: Axis,
        bucket_bytes: int,
        reductions: Reductions,
    ) -> None:
        self.shard, self.reductions = shard, reductions
        super().__init__(key, members, counted, axes, shard, bucket_bytes)
        self._buckets_of: list[list[int]] = [[] for _ in self.parameters]
        for number, bucket in enumerate(self.buckets):
            for piece in bucket.pieces:
                self._buckets_of[piece.member].append(number)
        self._unsent: list[set[int]] = [set() for _ in self.buckets]  # members with a gradient

    def _flat_gradient(self) -> Tensor:
        for member, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, member))
        device = self.parameters[0].device
        return torch.zeros(self.length // self.shard.size, dtype=torch.float32, device=device)

    def _arrived(self, member: int, parameter: Tensor) -> None:
        """Take note of a new gradient, and send the buckets that it completes."""
        for number in self._buckets_of[member]:
            self._unsent[number].add(member)
        for number in self._buckets_of[member]:
            if len(self._unsent[number]) == len(self.buckets[number].pieces):
                self._send(number)

    @torch.no_grad()
    def _send(self, number: int) -> None:
        """Add the bucket's run of the sum over ``shard`` to the gradient."""
        bucket, unsent = self.buckets[number], self._unsent[number]
        assert bucket.gradient is not None
        whole = bucket.gradient.new_zeros(len(bucket.gradient) * self.shard.size)
        for member, start, stop, part in bucket.pieces:
            if member in unsent:
                gradient = self.parameters[member].grad
                assert gradient is not None
                sent = gradient.view(-1)[start:stop]
                whole[part].copy_(sent)
                sent.zero_()  # the rest of it may stay, and take another microstep's
        unsent_members = [*unsent]
        unsent.clear()
        self.reductions.add(bucket.gradient, partial(self.shard.start_reduce_scatter, whole))
        for member in unsent_members:
            if not any(member in self._unsent[other] for other in self._buckets_of[member]):
                self.parameters[member].grad = None

    def finish_gradients(self) -> None:
        """Send the buckets of which some members had no gradient."""
        for number, unsent in enumerate(self._unsent):
            if unsent:
                self._send(number)

    def zero_grad(self) -> None:
        super().zero_grad()
        for unsent in self._unsent:
            unsent.clear()


class SpreadGroup(Group):
    """The weight of one layer, a run on each rank of ``shard``, which the layer gathers in use.

    The parameter becomes a placeholder, if it is not yet.
    """

    reduced = spread = True

    def __init__(
        self,
        key: Key,
        name: str,
        weight: Parameter,
        layer: Storing,
        counted: list[Segment],
        axes: Axes,
        reductions: Reductions,
    ) -> None:
        self.shard = shard = axes.shard
        self.store = SpreadWeight(weight, shard, trained=True, unit=key.unit)
        self.store.reductions = reductions
        whole_bytes = 4 * (weight.numel() + shard.size * key.unit)  # one bucket
        super().__init__(key, {name: weight}, counted, axes, shard, whole_bytes)
        layer.store = self.store
        Placeholder.replace(weight, name)

    def _flat_weights(self) -> Tensor:
        return self.store.run

    def _flat_gradient(self) -> Tensor:
        assert self.store.gradient is not None
        return self.store.gradient
