"""A group: parameters treated alike, in one flat vector, with the state that this rank keeps."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from llamax.backends.transfer import at_home, move_parameter, moved, settle
from llamax.config.choices import EAGER_BACKENDS
from llamax.config.constants import GRADIENT_BYTES, STATE_BLOCK
from llamax.optim.blockwise import Blockwise
from llamax.optim.buckets import Segment, buckets, padded, pieces, shared_spans
from llamax.optim.gradients import Accumulated, Autograd, Gradients, Reduced, Sharded
from llamax.optim.layouts import Flat, Separate, Stored
from llamax.optim.state import Bucket, Kind
from llamax.parallel.collectives import Axes, Axis
from llamax.parallel.fsdp import FsdpWeight
from llamax.parallel.placeholder import Placeholder
from llamax.parallel.reductions import Reductions
from llamax.parallel.sharding import Storing


@dataclass(frozen=True)
class Owned:
    """A shard of one parameter that this rank owns; writing into ``tensor`` changes the live state.

    ``start`` counts elements of this tensor rank's share of parameter ``name``, flattened.  Moments
    in 8 bits are copies, which are taken back once all of a bucket have been iterated over.
    """

    name: str
    kind: Kind
    start: int
    tensor: Tensor


class Key(NamedTuple):
    """What the parameters of a group have in common.

    ``weight``: of every element in the norm, None where they differ; ``partial``: each tensor rank
    has a part of the gradient; ``zero``: the ZeRO stage; ``alone``: the one member, where gathered
    on its own; ``tied``: whether the first and the last stage of a pipeline each have a part of the
    gradient; ``bits``: of each moment; ``offload``: whether moments and masters lie on the host;
    ``lr_scale``: the factor on the learning rate.
    """

    dtype: torch.dtype
    decays: bool
    weight: float | None
    partial: bool
    zero: int = 1
    alone: str = ""
    tied: bool = False
    bits: int = 32
    offload: bool = False
    lr_scale: float = 1.0

    @property
    def unit(self) -> int:
        """What shards are a multiple of, in elements: a block of moments in 8 bits."""
        return STATE_BLOCK if self.bits == 8 else 1


class Group:
    """Parameters that are treated alike, as one vector, with the state of this rank's shards of it.

    ``layer`` gathers the one weight of its group when it is used: this is sharded over
    ``shard``, and the parameter a placeholder, if it is not yet.
    """

    def __init__(
        self,
        key: Key,
        members: Mapping[str, Parameter],
        counted: list[Segment],
        axes: Axes,
        shard: Axis,
        bucket_bytes: int,
        reductions: Reductions,
        layer: Storing | None = None,
    ) -> None:
        self.key, self.names, self.parameters = key, list(members), list(members.values())
        self.shard, self.reductions = shard, reductions
        self.lengths = [parameter.numel() for parameter in self.parameters]
        unit = shard.size * key.unit
        self.length = padded(sum(self.lengths), unit)
        self.store: FsdpWeight | None = None
        self.weights: Flat | Separate | Stored
        if layer is None:
            self.weights = Flat(self.parameters, self.length, key.dtype)
            for parameter, view in zip(self.parameters, self.weights.tensors, strict=True):
                view.copy_(parameter.data)
                parameter.data = view
        else:
            self.store = layer.store = FsdpWeight(self.parameters[0], shard, reductions, key.unit)
            self.weights, bucket_bytes = Stored(self.store), GRADIENT_BYTES * self.length
        self.device = device = self.weights.stored[0].device
        self.separate = key.dtype != torch.float32 or device.type not in EAGER_BACKENDS
        self.shares = axes.kv.size > 1 and any(segment.shared for segment in counted)
        sent = self.shares or key.partial or key.tied or axes.data.size > 1
        self.accumulates = self.separate or sent
        self.buckets = [
            self._bucket(number, *stretch, counted)
            for number, stretch in enumerate(buckets(self.length, unit, bucket_bytes))
        ]
        self.gradients = self._gradients()
        if layer is not None:
            Placeholder.replace(self.parameters[0], self.names[0])

    def _bucket(self, number: int, start: int, stop: int, counted: Sequence[Segment]) -> Bucket:
        """Elements [start, stop) of the group, with the state of this rank's shard of them."""
        size, rank = self.shard.size, self.shard.rank
        length = (stop - start) // size
        own = slice(start + rank * length, start + (rank + 1) * length)
        (weights,) = self.weights.stored
        weights, master = weights[own if self.store is None else slice(length)], None
        if self.separate:
            master = at_home(weights.to(torch.float32, copy=True), self.key.offload)
        summed = own if self.key.zero > 1 else slice(start, stop)
        spans = shared_spans(counted, summed.start, summed.stop) if self.shares else ()
        return Bucket(
            number=number,
            start=start,
            stop=stop,
            pieces=tuple(pieces(self.lengths, start, stop)),
            shared=tuple(spans),
            weights=weights,
            master=weights if master is None else master,
            exp_avg=self._moment(length, signed=True),
            exp_avg_sq=self._moment(length, signed=False),
            root=_roots(counted, own).to(self.device) if self.key.weight is None else None,
            offload=self.key.offload,
        )

    def _moment(self, length: int, signed: bool) -> Tensor | Blockwise:
        """Zeros where a moment of a shard is kept."""
        if self.key.bits == 8:
            return Blockwise(length, signed, self.device, self.key.offload)
        return at_home(torch.zeros(length, device=self.device), self.key.offload)

    def _gradients(self) -> Gradients:
        """Gradients on an eager device."""
        if self.store is not None:
            assert self.store.gradient is not None
            return Sharded([self.store.gradient])
        if self.key.zero == 2:
            shards = [torch.zeros(len(b.master), device=self.device) for b in self.buckets]
            return Reduced(self.parameters, self.buckets, shards, self.shard, self.reductions)
        if self.accumulates:
            return Accumulated(self.parameters, Flat(self.parameters, self.length, torch.float32))
        return Autograd(self.parameters)

    def to(self, device: torch.device | str) -> None:
        """Move weights and state to a device that traces programs, and clear the gradients."""
        home = self.device

        def zeros(shape: Sequence[int]) -> Tensor:
            return moved(torch.zeros(shape, device=home), device)

        self.separate = self.accumulates = True
        self.buckets = [self._moved(bucket, device) for bucket in self.buckets]
        if self.store is not None:
            self.store.local = moved(self.store.local, device)
            self.store.gradient = zeros(self.store.local.shape)
            self.gradients = Sharded([self.store.gradient])
            return
        for parameter in self.parameters:
            move_parameter(parameter, device)
        self.weights = Separate(self.parameters)
        if self.key.zero == 2:
            shards = [zeros(bucket.master.shape) for bucket in self.buckets]
            self.gradients = Reduced(
                self.parameters, self.buckets, shards, self.shard, self.reductions
            )
        else:
            totals = [zeros(parameter.shape) for parameter in self.parameters]
            self.gradients = Accumulated(self.parameters, Separate(totals))

    def _moved(self, bucket: Bucket, device: torch.device | str) -> Bucket:
        """The bucket there; what kv replicas share of a shard depends on the rank: a tensor."""
        assert isinstance(bucket.exp_avg, Tensor), "a rule refuses 8 bits here"
        assert isinstance(bucket.exp_avg_sq, Tensor)
        spans, mask = bucket.shared, None
        if self.key.zero > 1 and self.shares:
            mask = torch.zeros(len(bucket.master))
            for start, stop in spans:
                mask[start:stop] = 1.0
            spans, mask = (), moved(mask.to(bucket.master.device), device)
        return replace(
            bucket,
            shared=spans,
            shared_mask=mask,
            weights=None,
            master=moved(bucket.master, device),
            exp_avg=moved(bucket.exp_avg, device),
            exp_avg_sq=moved(bucket.exp_avg_sq, device),
            root=None if bucket.root is None else moved(bucket.root, device),
        )

    def gradients_of(self, names: Collection[str]) -> dict[str, Tensor]:
        """The whole gradients that this rank has of those of ``names`` that are in the group."""
        found = {n: self.gradients.whole(at) for at, n in enumerate(self.names) if n in names}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def owned(self) -> Iterator[Owned]:
        """The shards that this rank owns."""
        if self.key.offload:
            settle(self.device)
        for bucket in self.buckets:
            length = len(bucket.master)
            first = bucket.start + self.shard.rank * length
            with bucket.saved(self.key.dtype) as state:
                for member, start, _, part in pieces(self.lengths, first, first + length):
                    for kind, values in state.items():
                        yield Owned(self.names[member], kind, start, values[part])


def _roots(counted: Sequence[Segment], own: slice) -> Tensor:
    """The square roots of the weights in the norm of a shard's elements; 0 in the padding."""
    roots = torch.zeros(own.stop - own.start)
    for piece in pieces([segment.length for segment in counted], own.start, own.stop):
        roots[piece.part].fill_(sqrt(counted[piece.member].weight))
    return roots
