"""Where the weights or gradients of a group lie, as long as each rank keeps them whole.

On eager devices they are one flat vector, of which parameters are views: ``Flat``.  A device that
traces programs keeps every view as a buffer of its own, so weights that are views of one vector
would lie in memory three times; and a slice of this rank would put the rank into the program.
So there every parameter and every gradient is a tensor of its own, ``Separate``; buckets are joined
inside the program, and what depends on the rank is cut on the host, before it is moved::

    tensors     [ g0 ]   [ g1      ]   [ g2 ]          microsteps add to each
    buckets     [ g0 | g1 ]    [ g1 | g2 | pad ]       the optimizer step joins and sends them

What is written in place on an eager device, to save memory, is a new tensor in a traced program,
whose compiler reuses memory by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llamax.config.choices import EAGER_BACKENDS
from llamax.optim.state import Bucket
from llamax.parallel.fsdp import FsdpWeight


def is_eager(x: Tensor) -> bool:
    """Whether the device of ``x`` runs each operation at once, and traces no programs."""
    return x.device.type in EAGER_BACKENDS


class Flat:
    """Tensors shaped like ``parameters``, as views of a ``vector`` of padded ``length``."""

    def __init__(self, parameters: Sequence[Tensor], length: int, dtype: torch.dtype) -> None:
        self.vector = torch.zeros(length, dtype=dtype, device=parameters[0].device)
        lengths = [parameter.numel() for parameter in parameters]
        parts = self.vector[: sum(lengths)].split(lengths)
        self.tensors = [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]
        self.stored = [self.vector]

    def of(self, bucket: Bucket) -> Tensor:
        """The bucket's elements."""
        return self.vector[bucket.start : bucket.stop]

    def put(self, bucket: Bucket, values: Tensor) -> None:
        """Write new values of a bucket."""
        self.of(bucket).copy_(values)


class Separate:
    """``tensors`` of their own, for devices that trace programs."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = self.stored = list(tensors)
        self._arrived: list[Tensor] = []  # new values of the tensor that comes next

    def of(self, bucket: Bucket) -> Tensor:
        """The bucket's elements, as a new vector."""
        return joined(
            bucket,
            {at: self.tensors[at].reshape(-1)[start:stop] for at, start, stop, _ in bucket.pieces},
        )

    def put(self, bucket: Bucket, values: Tensor) -> None:
        """Write new values of a bucket; buckets come in order."""
        for member, _, stop, place in bucket.pieces:
            self._arrived.append(values[place])
            tensor = self.tensors[member]
            if stop == tensor.numel():
                # Not copied into: a tensor written in place is read by another program than before.
                # A copy and no view: a view would keep what it is of beside it.
                whole = torch.cat(self._arrived).view(tensor.shape)
                tensor.data = whole.to(tensor.dtype, copy=True)
                self._arrived = []


class Stored:
    """The shard of one weight, in the store that a layer gathers it from."""

    def __init__(self, store: FsdpWeight) -> None:
        self.store = store

    @property
    def stored(self) -> list[Tensor]:
        return [self.store.local]

    def put(self, bucket: Bucket, values: Tensor) -> None:
        """Write new values of the shard."""
        if is_eager(values):
            self.store.local.copy_(values)
        else:  # not in place, for the same reason
            self.store.local = values.to(self.store.local.dtype, copy=True)


def joined(bucket: Bucket, parts: Mapping[int, Tensor]) -> Tensor:
    """A bucket's vector of float32 from its pieces, by member; zeros where one is missing."""
    some = next(iter(parts.values()))
    if is_eager(some):
        whole = some.new_zeros(bucket.stop - bucket.start, dtype=torch.float32)
        for member, _, _, place in bucket.pieces:
            if member in parts:
                whole[place].copy_(parts[member])
        return whole
    pieces = [
        parts[member] if member in parts else some.new_zeros(stop - start)
        for member, start, stop, _ in bucket.pieces
    ]
    if padding := bucket.stop - bucket.start - sum(map(len, pieces)):
        pieces.append(some.new_zeros(padding))
    return torch.cat(pieces)


def kept(place: Tensor, value: Tensor) -> Tensor:
    """``value``, on an eager device copied into ``place``, the start of a used gradient."""
    return place.copy_(value) if is_eager(value) else value


def replaced(gradient: Tensor, spans: Sequence[tuple[int, int]], parts: Sequence[Tensor]) -> Tensor:
    """``gradient`` with ``parts`` written at ``spans``: in place, or where traced a new vector."""
    if is_eager(gradient):
        torch._foreach_copy_([gradient[start:stop] for start, stop in spans], list(parts))
        return gradient
    pieces, done = [], 0
    for (start, stop), part in zip(spans, parts, strict=True):
        pieces += [gradient[done:start], part] if done < start else [part]
        done = stop
    return torch.cat([*pieces, gradient[done:]] if done < len(gradient) else pieces)


def split_like(flat: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """Views of ``flat`` as long as each of ``parts``; of one part, ``flat`` itself."""
    if len(parts) == 1:
        return [flat]
    return list(torch.split(flat, [part.numel() for part in parts]))
