"""A group on a device that traces programs: the same arithmetic, without views and rank slices.

A tracing device keeps every view as a buffer of its own, so weights that are views of one vector
would lie in memory three times; and a slice at ``rank * run`` would put the rank into the program.
So every parameter and every gradient is a tensor of its own, buckets are joined inside the program,
and what depends on the rank is cut on the host, before it is moved::

    gradients   [ g0 ]   [ g1      ]   [ g2 ]          microsteps add to each
    buckets     [ g0 | g1 ]    [ g1 | g2 | pad ]       the optimizer step joins and sends them
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llamax.backends.transfer import move_parameter, moved
from llamax.optim.buckets import pieces
from llamax.optim.groups import Accumulate, Bucket, Group, Owned


class LazyGroup:
    """``group`` with its state, moved to ``device``; its Parameters lie there from now on."""

    reduced = spread = False

    def __init__(self, group: Group, device: torch.device | str) -> None:
        self.key, self.names, self.parameters = group.key, group.names, group.parameters
        self.lengths, self.length, self.separate = group.lengths, group.length, True
        self.accumulates = True
        self.gradients = []
        for parameter in self.parameters:
            total = torch.zeros(parameter.shape, device="meta" if parameter.is_meta else "cpu")
            move_parameter(parameter, device)
            self.gradients.append(moved(total, device))
            parameter.register_post_accumulate_grad_hook(Accumulate(self.gradients[-1]))
        self.buckets = [
            Bucket(
                start=bucket.start,
                pieces=bucket.pieces,
                shared=bucket.shared,
                master=moved(bucket.master.to(torch.float32), device),
                exp_avg=moved(bucket.exp_avg, device),
                exp_avg_sq=moved(bucket.exp_avg_sq, device),
                root=None if bucket.root is None else moved(bucket.root, device),
            )
            for bucket in group.buckets
        ]
        self.arrived: list[Tensor] = []  # new weights of the parameter that comes next

    def sums(self) -> list[Tensor]:
        """Where gradients are summed over microsteps."""
        return self.gradients

    def gradient_of(self, bucket: Bucket) -> Tensor:
        """The bucket's summed gradient, as a new vector."""
        parts = [self.gradients[at].reshape(-1)[start:stop] for at, start, stop in bucket.pieces]
        if bucket is self.buckets[-1] and (pad := self.length - sum(self.lengths)):
            parts.append(parts[0].new_zeros(pad))
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
        offset = 0
        for at, start, stop in bucket.pieces:
            self.arrived.append(weights[offset : offset + stop - start])
            offset += stop - start
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
        """Host copies of the runs that this rank, ``rank`` of the data ranks, owns: for saving."""
        for bucket in self.buckets:
            master, exp_avg, exp_avg_sq = (
                tensor.cpu() for tensor in (bucket.master, bucket.exp_avg, bucket.exp_avg_sq)
            )
            weight = master.to(self.key.dtype)
            first = bucket.start + rank * len(master)
            offset = 0
            for at, start, stop in pieces(self.lengths, first, first + len(master)):
                part = slice(offset, offset + stop - start)
                offset += stop - start
                yield Owned(self.names[at], "weight", start, weight[part])
                yield Owned(self.names[at], "master", start, master[part])
                yield Owned(self.names[at], "exp_avg", start, exp_avg[part])
                yield Owned(self.names[at], "exp_avg_sq", start, exp_avg_sq[part])
