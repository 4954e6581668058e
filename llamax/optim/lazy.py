"""A group on a device that traces programs: the same arithmetic, without views and rank slices.

A tracing device keeps every view as a buffer of its own, so weights that are views of one vector
would lie in memory three times; and a slice at ``rank * run`` would put the rank into the program.
So every parameter and every gradient is a tensor of its own, buckets are joined inside the program,
and what depends on the rank is cut on the host, before it is moved::

    gradients   [ g0 ]   [ g1      ]   [ g2 ]          microsteps add to each
    buckets     [ g0 | g1 ]    [ g1 | g2 | pad ]       the optimizer step joins and sends them

From ZeRO-2 on a microstep joins and sends a bucket as soon as backward has made its gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from llamax.backends.transfer import move_parameter, moved
from llamax.optim.buckets import pieces
from llamax.optim.groups import Accumulate, Bucket, FlatBucket, Group, Owned
from llamax.optim.reduced_groups import ReducedGroup, SpreadGroup


class LazyGroup:
    """``group`` with its state, moved to ``device``; its Parameters lie there from now on."""

    reduced = spread = False

    def __init__(self, group: Group, device: torch.device | str) -> None:
        self.key, self.names, self.parameters = group.key, group.names, group.parameters
        self.lengths, self.length, self.separate = group.lengths, group.length, True
        self.accumulates = True
        self._move(group, device)
        self.buckets = [self._moved(bucket, device) for bucket in group.buckets]
        self.arrived: list[Tensor] = []  # new weights of the parameter that comes next

    def _move(self, group: Group, device: torch.device | str) -> None:
        """Move the weights, and make what microsteps add their gradients to."""
        self.gradients = []
        for parameter in self.parameters:
            total = torch.zeros(parameter.shape, device="meta" if parameter.is_meta else "cpu")
            move_parameter(parameter, device)
            self.gradients.append(moved(total, device))
            parameter.register_post_accumulate_grad_hook(Accumulate(self.gradients[-1]))

    def _moved(self, bucket: FlatBucket, device: torch.device | str) -> Bucket:
        assert isinstance(bucket.exp_avg, Tensor), "a rule refuses 8 bits here"
        assert isinstance(bucket.exp_avg_sq, Tensor)
        return Bucket(
            start=bucket.start,
            pieces=bucket.pieces,
            shared=bucket.shared,
            master=moved(bucket.master.to(torch.float32), device),
            exp_avg=moved(bucket.exp_avg, device),
            exp_avg_sq=moved(bucket.exp_avg_sq, device),
            root=None if bucket.root is None else moved(bucket.root, device),
        )

    def sums(self) -> list[Tensor]:
        """Where gradients are summed over microsteps."""
        return self.gradients

    def gradient_of(self, bucket: Bucket) -> Tensor:
        """The bucket's summed gradient, as a new vector."""
        parts = [self.gradients[at].reshape(-1)[start:stop] for at, start, stop, _ in bucket.pieces]
        return self._joined(bucket, parts)

    def _joined(self, bucket: Bucket, parts: list[Tensor]) -> Tensor:
        """The parts of a bucket end to end, with the padding of the last bucket."""
        if bucket is self.buckets[-1] and (pad := self.length - sum(self.lengths)):
            parts = [*parts, parts[0].new_zeros(pad)]
        return torch.cat(parts)

    def finish_gradients(self) -> None:
        """Nothing is left unsent."""

    def keep(self, place: Tensor, value: Tensor) -> Tensor:
        """Return ``value``: the compiler of a program reuses memory by itself."""
        return value

    def replace(
        self, gradient: Tensor, spans: Sequence[tuple[int, int]], parts: Sequence[Tensor]
    ) -> Tensor:
        """A new vector: ``gradient`` with ``parts`` written at ``spans``."""
        pieces, done = [], 0
        for (start, stop), part in zip(spans, parts, strict=True):
            pieces += [gradient[done:start], part] if done < start else [part]
            done = stop
        return torch.cat([*pieces, gradient[done:]] if done < len(gradient) else pieces)

    def put(self, bucket: Bucket, weights: Tensor) -> None:
        """Write the bucket's new weights; buckets come in order."""
        for at, _, stop, part in bucket.pieces:
            self.arrived.append(weights[part])
            if stop == self.lengths[at]:
                parameter = self.parameters[at]
                # Not copied into: a tensor written in place is read by another program than before.
                # A copy and no view: a view would keep what it is of beside it.
                whole = torch.cat(self.arrived).view(parameter.shape)
                parameter.data = whole.to(parameter.dtype, copy=True)
                self.arrived = []

    def zero_grad(self) -> None:
        """Clear the accumulated gradients."""
        for gradient in self.gradients:
            gradient.zero_()

    def owned(self, rank: int) -> Iterator[Owned]:
        """Host copies of the runs that this rank, ``rank`` of ``shard``, owns: for saving."""
        for bucket in self.buckets:
            master, exp_avg, exp_avg_sq = (
                tensor.cpu()
                for tensor in (bucket.master, bucket.exp_avg, bucket.exp_avg_sq)
                if isinstance(tensor, Tensor)
            )
            weight = master.to(self.key.dtype)
            first = bucket.start + rank * len(master)
            for at, start, _, part in pieces(self.lengths, first, first + len(master)):
                yield Owned(self.names[at], "weight", start, weight[part])
                yield Owned(self.names[at], "master", start, master[part])
                yield Owned(self.names[at], "exp_avg", start, exp_avg[part])
                yield Owned(self.names[at], "exp_avg_sq", start, exp_avg_sq[part])


class _LazyRuns(LazyGroup):
    """Gradients as runs, which a microstep adds to.

    Which elements kv replicas have parts of depends on the data rank, so it is a tensor.
    """

    reduced = True

    def __init__(self, group: ReducedGroup | SpreadGroup, device: torch.device | str) -> None:
        self.shard, self.shares, self.gradients = group.shard, group.shares, list[Tensor]()
        super().__init__(group, device)

    def _moved(self, bucket: FlatBucket, device: torch.device | str) -> Bucket:
        assert bucket.gradient is not None
        self.gradients.append(moved(bucket.gradient, device))
        mask = None
        if self.shares:
            mask = torch.zeros(len(bucket.master))
            for start, stop in bucket.shared:
                mask[start:stop] = 1.0
            mask = moved(mask.to(bucket.master.device), device)
        return replace(super()._moved(bucket, device), shared=(), shared_mask=mask)

    def gradient_of(self, bucket: Bucket) -> Tensor:
        """The bucket's run of the summed gradient."""
        return next(r for b, r in zip(self.buckets, self.gradients, strict=True) if b is bucket)


class LazyReducedGroup(_LazyRuns):
    """A ``ReducedGroup`` on a device that traces programs."""

    def _move(self, group: Group, device: torch.device | str) -> None:
        for member, parameter in enumerate(self.parameters):
            move_parameter(parameter, device)
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, member))
        self._parts: list[dict[int, Tensor]] = [{} for _ in group.buckets]

    def _arrived(self, member: int, parameter: Tensor) -> None:
        """Take a new gradient, and send the buckets that it completes."""
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad.reshape(-1).float(), None
        for bucket, parts in zip(self.buckets, self._parts, strict=True):
            for at, start, stop, _ in bucket.pieces:
                if at == member:
                    part = gradient[start:stop]
                    parts[at] = parts[at] + part if at in parts else part
                    if len(parts) == len(bucket.pieces):
                        self._send(bucket, parts)

    def _send(self, bucket: Bucket, parts: dict[int, Tensor]) -> None:
        """Add the bucket's run of the sum over ``shard`` to the gradient."""
        run = self.gradient_of(bucket)
        whole = [
            parts[at] if at in parts else run.new_zeros(stop - start)
            for at, start, stop, _ in bucket.pieces
        ]
        run.add_(self.shard.reduce_scatter(self._joined(bucket, whole), 0))
        parts.clear()

    def finish_gradients(self) -> None:
        """Send the buckets of which some members had no gradient."""
        for bucket, parts in zip(self.buckets, self._parts, strict=True):
            if parts:
                self._send(bucket, parts)


class LazySpreadGroup(_LazyRuns):
    """A ``SpreadGroup`` on a device that traces programs."""

    spread = True

    def _move(self, group: Group, device: torch.device | str) -> None:
        assert isinstance(group, SpreadGroup)
        self.store = group.store
        self.store.reductions = None  # its compiler decides what goes on at the same time
        self.store.spread.run = moved(self.store.run, device)

    def _moved(self, bucket: FlatBucket, device: torch.device | str) -> Bucket:
        found = super()._moved(bucket, device)
        self.store.gradient = self.gradients[0]
        return found

    def put(self, bucket: Bucket, weights: Tensor) -> None:
        """Take new weights, for the same reasons not in place."""
        self.store.spread.run = weights.to(self.key.dtype, copy=True)


def lazy_group(group: Group, device: torch.device | str) -> LazyGroup:
    """The group on a device that traces programs."""
    if isinstance(group, SpreadGroup):
        return LazySpreadGroup(group, device)
    if isinstance(group, ReducedGroup):
        return LazyReducedGroup(group, device)
    return LazyGroup(group, device)
