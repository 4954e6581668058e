"""A group: parameters treated alike, in one flat vector, with the state that this rank keeps."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from llamax.backends.transfer import at_home, settle
from llamax.config.choices import EAGER_BACKENDS
from llamax.config.constants import STATE_BLOCK
from llamax.optim.blockwise import Blockwise
from llamax.optim.buckets import Piece, Segment, buckets, padded, pieces, shared_spans
from llamax.parallel.collectives import Axes, Axis
from llamax.parallel.weight_gradient import GradientSum

Kind = Literal["weight", "master", "exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Kind, Kind] = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Owned:
    """A run of one parameter that this rank owns; writing into ``tensor`` changes the live state.

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
        """What runs are a multiple of, in elements: a block of moments in 8 bits."""
        return STATE_BLOCK if self.bits == 8 else 1


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A stretch of a group, communicated and updated at once; tensors are of this rank's run."""

    start: int
    pieces: tuple[Piece, ...]
    shared: tuple[tuple[int, int], ...]  # where kv replicas have parts of the summed gradient
    master: Tensor
    exp_avg: Tensor | Blockwise
    exp_avg_sq: Tensor | Blockwise
    root: Tensor | None  # square roots of the weights in the norm, where they differ by element
    shared_mask: Tensor | None = None  # 1.0 at ``shared``, where spans would tell ranks apart

    @property
    def shared_elements(self) -> int:
        """The number of elements that are summed over key/value replicas."""
        if self.shared_mask is not None:
            return len(self.shared_mask)
        return sum(stop - start for start, stop in self.shared)

    @property
    def moments(self) -> tuple[Tensor | Blockwise, Tensor | Blockwise]:
        """AdamW's moments, in the order of ``MOMENTS``."""
        return self.exp_avg, self.exp_avg_sq

    @contextmanager
    def state(self, accepted: Tensor) -> Iterator[list[Tensor]]:
        """Master and moments in float32 on the device, to be changed in place by one step.

        They are kept where ``accepted`` is true.
        """
        assert isinstance(self.exp_avg, Tensor)
        assert isinstance(self.exp_avg_sq, Tensor)
        yield [self.master, self.exp_avg, self.exp_avg_sq]


@dataclass(frozen=True, kw_only=True)
class FlatBucket(Bucket):
    """A bucket of flat vectors: ``weights`` and ``gradient`` whole, ``owned`` this rank's run.

    From ZeRO-2 on the gradient is this rank's run, and so are the weights in ZeRO-3.
    """

    weights: Tensor
    owned: Tensor  # this rank's run of the weights; the master itself where they are float32
    gradient: Tensor | None  # None: parameters keep the gradients of autograd
    offload: bool = False

    @contextmanager
    def state(self, accepted: Tensor) -> Iterator[list[Tensor]]:
        """``Bucket.state``, of moments in 8 bits and of what lies in host memory as well."""
        kept = (self.master, *self.moments)
        fetched = [self._fetched(x) for x in kept]
        yield fetched
        for x, changed in zip(kept, fetched, strict=True):
            if isinstance(x, Blockwise):
                x.take(changed, accepted)
            elif x is not changed:
                x.copy_(changed, non_blocking=True)
        if self.master is not fetched[0]:
            self.owned.copy_(fetched[0])

    def _fetched(self, x: Tensor | Blockwise) -> Tensor:
        if isinstance(x, Blockwise):
            return x.values()
        if self.offload and x is not self.owned:
            return x.to(self.owned.device, non_blocking=True, copy=True)
        return x


class Group:
    """Parameters that are treated alike, in one flat vector."""

    reduced = False  # whether gradients are summed over ``shard`` as backward makes them
    spread = False  # whether weights are runs, gathered when they are used

    def __init__(
        self,
        key: Key,
        members: Mapping[str, Parameter],
        counted: list[Segment],
        axes: Axes,
        shard: Axis,
        bucket_bytes: int,
    ) -> None:
        self.key, self.names, self.parameters = key, list(members), list(members.values())
        self.lengths = [parameter.numel() for parameter in self.parameters]
        unit = shard.size * key.unit
        self.length = padded(sum(self.lengths), unit)
        self.weights = self._flat_weights()
        self.device = device = self.weights.device
        self.separate = key.dtype != torch.float32 or device.type not in EAGER_BACKENDS
        self.shares = axes.kv.size > 1 and any(segment.shared for segment in counted)
        self.gradient: Tensor | None = None
        if self.separate or self.shares or key.partial or key.tied or axes.data.size > 1:
            self.gradient = self._flat_gradient()
        self.accumulates = self.gradient is not None
        self.buckets = [
            self._bucket(start, stop, shard, counted)
            for start, stop in buckets(self.length, unit, bucket_bytes)
        ]

    def _bucket(self, start: int, stop: int, shard: Axis, counted: Sequence[Segment]) -> FlatBucket:
        """Elements [start, stop) of the flat vector, with the state of this rank's run of them."""
        run = (stop - start) // shard.size
        own = slice(start + shard.rank * run, start + (shard.rank + 1) * run)
        held = slice(start // shard.size, stop // shard.size)  # in vectors of this rank's runs
        summed = own if self.reduced else slice(start, stop)
        owned, master = self.weights[held if self.spread else own], None
        if self.separate:
            master = at_home(owned.to(torch.float32, copy=True), self.key.offload)
        gradient = self.gradient
        if gradient is not None:
            gradient = gradient[held if self.reduced else summed]
        spans = shared_spans(counted, summed.start, summed.stop) if self.shares else ()
        return FlatBucket(
            start=start,
            pieces=tuple(pieces(self.lengths, start, stop)),
            shared=tuple(spans),
            weights=owned if self.spread else self.weights[start:stop],
            owned=owned,
            master=owned if master is None else master,
            exp_avg=self._moment(run, signed=True),
            exp_avg_sq=self._moment(run, signed=False),
            gradient=gradient,
            offload=self.key.offload,
            root=_roots(counted, own).to(self.device) if self.key.weight is None else None,
        )

    def _moment(self, length: int, signed: bool) -> Tensor | Blockwise:
        """Zeros where a moment of a run is kept."""
        if self.key.bits == 8:
            return Blockwise(length, signed, self.device, self.key.offload)
        return at_home(torch.zeros(length, device=self.device), self.key.offload)

    def _flat_weights(self) -> Tensor:
        """All weights end to end; parameters become views of them."""
        flat = torch.zeros(self.length, dtype=self.key.dtype, device=self.parameters[0].device)
        for parameter, view in zip(self.parameters, self._views(flat), strict=True):
            view.copy_(parameter.data)
            parameter.data = view
        return flat

    def _flat_gradient(self) -> Tensor:
        """Where gradients are summed, in float32, and the hooks that do it."""
        device = self.parameters[0].device
        total = torch.zeros(self.length, dtype=torch.float32, device=device)
        for parameter, view in zip(self.parameters, self._views(total), strict=True):
            parameter.register_post_accumulate_grad_hook(Accumulate(view))
        return total

    @cached_property
    def gradient_sums(self) -> dict[str, GradientSum]:
        """Where the gradient of each parameter is summed, by name."""
        kept = [None] * len(self.names) if self.gradient is None else self._views(self.gradient)
        sums = map(GradientSum, self.parameters, kept)
        return dict(zip(self.names, sums, strict=True))

    def finish_gradients(self) -> None:
        """Send what backward has left unsent, before an optimizer step."""

    def take_gradients(self, bucket: Bucket) -> list[Tensor]:
        """Take the bucket's gradient from the parameters, in flat parts, and clear it there."""
        taken = []
        for member, start, stop, _ in bucket.pieces:
            total = self.gradient_sums[self.names[member]]
            parts = total.parts() or [self.parameters[member].new_zeros(self.lengths[member])]
            for number, low, high, _ in pieces([*map(len, parts)], start, stop):
                taken.append(parts[number][low:high])
            if stop == self.lengths[member]:
                total.clear()
        return taken

    def sums(self) -> list[Tensor]:
        """Where gradients are summed over microsteps."""
        return [] if self.gradient is None else [self.gradient]

    def gradient_of(self, bucket: Bucket) -> Tensor | None:
        """The bucket's accumulated gradient; None where parameters keep autograd's gradients."""
        assert isinstance(bucket, FlatBucket)
        return bucket.gradient

    def keep(self, place: Tensor, value: Tensor) -> Tensor:
        """Copy ``value`` into ``place``, the start of a used gradient, to save memory."""
        return place.copy_(value)

    def replace(
        self, gradient: Tensor, spans: Sequence[tuple[int, int]], parts: Sequence[Tensor]
    ) -> Tensor:
        """Write ``parts`` into ``gradient`` at ``spans``, in place."""
        torch._foreach_copy_([gradient[start:stop] for start, stop in spans], list(parts))
        return gradient

    def put(self, bucket: Bucket, weights: Tensor) -> None:
        """Write new weights into the bucket's part of the flat vector."""
        assert isinstance(bucket, FlatBucket)
        bucket.weights.copy_(weights)

    def gradients_of(self, names: Collection[str]) -> dict[str, Tensor]:
        """The accumulated gradients of those of ``names`` that are in the group and have one.

        Empty where only a run of them is kept.
        """
        if self.reduced:
            return {}
        if self.gradient is not None:
            named = zip(self.names, self._views(self.gradient), strict=True)
            return {name: gradient for name, gradient in named if name in names}
        kept = {name: self.gradient_sums[name].parts() for name in self.names if name in names}
        shapes = dict(zip(self.names, (p.shape for p in self.parameters), strict=True))
        return {n: torch.cat(parts).view(shapes[n]) for n, parts in kept.items() if parts}

    def zero_grad(self) -> None:
        """Clear the accumulated gradients."""
        if self.gradient is None:
            for total in self.gradient_sums.values():
                total.clear()
            return
        self.gradient.zero_()
        for parameter in self.parameters:
            parameter.grad = None

    def owned(self, rank: int) -> Iterator[Owned]:
        """The runs that this rank, ``rank`` of those of ``shard``, owns."""
        if self.key.offload:
            settle(self.device)
        for bucket in self.buckets:
            run = bucket.owned.numel()
            first = bucket.start + rank * run
            copies = [(m, m.exact()) for m in bucket.moments if isinstance(m, Blockwise)]
            before = [values.clone() for _, values in copies]
            moments = [values for _, values in copies] or bucket.moments
            for member, start, _, part in pieces(self.lengths, first, first + run):
                name = self.names[member]
                yield Owned(name, "weight", start, bucket.owned[part])
                if bucket.master is not bucket.owned:
                    yield Owned(name, "master", start, bucket.master[part])
                for kind, values in zip(MOMENTS, moments, strict=True):
                    assert isinstance(values, Tensor)
                    yield Owned(name, kind, start, values[part])
            for (moment, values), old in zip(copies, before, strict=True):
                if not values.equal(old):
                    moment.load(values)

    def _views(self, flat: Tensor) -> list[Tensor]:
        """Each parameter's elements of a flat vector, in the parameter's shape."""
        parts = torch.split(flat[: sum(self.lengths)], self.lengths)
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]


def _roots(counted: Sequence[Segment], own: slice) -> Tensor:
    """The square roots of the weights in the norm of a run's elements; 0 in the padding."""
    roots = torch.zeros(own.stop - own.start)
    for piece in pieces([segment.length for segment in counted], own.start, own.stop):
        roots[piece.part].fill_(sqrt(counted[piece.member].weight))
    return roots


class Accumulate:
    """Add a parameter's new gradient to the float32 ``total`` and free it."""

    def __init__(self, total: Tensor) -> None:
        self.total = total

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is not None:  # the layer has not added it
            self.total.add_(parameter.grad)
            parameter.grad = None


def split_like(flat: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """Views of ``flat`` as long as each of ``parts``; of one part, ``flat`` itself."""
    if len(parts) == 1:
        return [flat]
    return list(torch.split(flat, [part.numel() for part in parts]))
