"""Fully sharded tensors: cut over data ranks, gathered when used and dropped after.

::

    data rank 0  [ shard ] ──┐                    ┌──> dense weight, for one product
                             ├─ gather when used ─┤
    data rank 1  [ shard ] ──┘                    └──> its gradient ── reduce-scatter ─> [ shard ]

``FsdpTensor`` is the cut: a flat tensor in shards of equal length, the last one padded.  The
quantised base of QLoRA keeps its bytes so.  ``FsdpWeight`` is a dense weight on top of it, frozen
or with a gradient (ZeRO-3, Rajbhandari et al. 2020, section 5.3; FSDP, Zhao et al. 2023).  It is
gathered in forward and again in backward, so no rank keeps a whole weight: where layers are
recomputed they gather again, and elsewhere ``gathered_again`` keeps autograd from saving what was
gathered.

No rank holds all weights whole before they are cut either (``llamax.parallel.placeholder``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from math import ceil
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from llamax.parallel import regions
from llamax.parallel.collectives import Axis
from llamax.parallel.placeholder import Placeholder, Values
from llamax.parallel.prefetch import Prefetch
from llamax.parallel.reductions import Reductions


class Store(Protocol):
    """A weight that has to be made before it can be used."""

    def weight(self) -> Tensor:
        """This tensor rank's share, dense, in the dtype of computation: [f, D]."""
        ...


class FsdpTensor:
    """A flat tensor cut over the ranks of ``shard``; ``gather`` joins it, ``local`` is this rank's.

    Its ``length`` elements are ``values``, of the dtype and on the device of ``like``; None: zeros.
    Shards are a multiple of ``unit`` elements.
    """

    def __init__(
        self, length: int, values: Values | None, shard: Axis, like: Tensor, unit: int = 1
    ) -> None:
        self.shard, self.length = shard, length
        each = ceil(length / (shard.size * unit)) * unit
        start = min(shard.rank * each, length)
        self.local = like.new_zeros(each)
        if values is not None:
            values(self.local[: min(each, length - start)], start)

    @classmethod
    def joined(cls, pieces: list[Tensor], shard: Axis, device: torch.device) -> FsdpTensor:
        """The pieces end to end, cut."""
        whole = torch.cat([piece.flatten() for piece in pieces])
        return cls(len(whole), values_of(whole), shard, whole.new_empty(0, device=device))

    def gather(self) -> Tensor:
        return self.shard.all_gather(self.local, 0)[: self.length]

    def start_gather(self) -> Callable[[], Tensor]:
        """Begin ``gather``; the function returned waits for it."""
        arrived = self.shard.start_all_gather(self.local)
        return lambda: arrived()[: self.length]

    def start_reduce(self, whole: Tensor) -> Callable[[], Tensor]:
        """Begin to sum ``whole`` [n] over ``shard`` in float32; the wait returns a shard."""
        if padding := self.shard.size * len(self.local) - self.length:
            whole = torch.nn.functional.pad(whole, (0, padding))
        return self.shard.start_reduce_scatter(whole.float())


def values_of(whole: Tensor) -> Values:
    """The elements of a tensor that exists."""
    flat = whole.reshape(-1)

    def copy(into: Tensor, start: int) -> None:
        into.copy_(flat[start : start + len(into)])

    return copy


class _Gather(torch.autograd.Function):
    """The whole weight of a shard; backward sums its gradient over ``shard``."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, store: FsdpWeight) -> Tensor:
        ctx.store = store
        return store.dense()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dw: Tensor) -> tuple[None, None]:
        ctx.store.add_gradient(dw)
        return None, None


class FsdpWeight:
    """A weight that is sharded over the ranks of ``shard``; a ``Store``.

    With ``reductions`` it is trained: they sum its gradient over the ranks into ``gradient``, a
    float32 shard, while backward goes on.  A placeholder is made here, this shard alone.
    """

    def __init__(
        self, weight: Tensor, shard: Axis, reductions: Reductions | None = None, unit: int = 1
    ) -> None:
        self.shape, device = weight.shape, weight.device
        if isinstance(weight, Placeholder):
            assert weight.home is not None, "it is sharded already"
            values, device = weight.initial, weight.home
        else:
            values = values_of(weight.detach())
        like = torch.empty(0, dtype=weight.dtype, device=device)
        self.tensor = FsdpTensor(weight.numel(), values, shard, like, unit)
        self.gradient: Tensor | None = None
        self.prefetch: Prefetch | None = None
        self.reductions = reductions
        if reductions is not None:
            self.gradient = torch.zeros(len(self.local), dtype=torch.float32, device=device)
            self._leaf = torch.zeros((), requires_grad=True)  # so that backward comes by

    @property
    def local(self) -> Tensor:
        """The shard that this rank keeps, with padding."""
        return self.tensor.local

    @local.setter
    def local(self, shard: Tensor) -> None:
        self.tensor.local = shard

    def weight(self) -> Tensor:
        """The whole weight, gathered; its gradient arrives in ``gradient``."""
        if self.gradient is None:
            return self.dense()
        whole = regions.apply(_Gather, self._leaf, self)
        if (gathered := _gathered.get()) is not None:
            gathered[StorageWeakRef(whole.untyped_storage())] = self
        return whole

    def dense(self) -> Tensor:
        """The whole weight, gathered, without a gradient."""
        whole = self.tensor.gather() if self.prefetch is None else self.prefetch.gather(self.tensor)
        return whole.view(self.shape)

    def add_gradient(self, dw: Tensor) -> None:
        """Add this rank's shard of the sum of ``dw`` over ``shard``."""
        assert self.gradient is not None
        assert self.reductions is not None
        start = partial(self.tensor.start_reduce, dw.reshape(-1))
        self.reductions.add(self.gradient, start)


def fsdp_weights(model: nn.Module) -> Iterator[FsdpWeight]:
    """The weights of a model that are cut over the data ranks."""
    for module in model.modules():
        store = getattr(module, "store", None)
        if isinstance(store, FsdpWeight):
            yield store


def prefetched(model: nn.Module) -> Prefetch:
    """Let the sharded weights of a model on an eager device be gathered ahead of their use."""
    prefetch = Prefetch()
    for weight in fsdp_weights(model):
        if weight.local.device.type != "xla":
            weight.prefetch = prefetch
    return prefetch


class _Saved(NamedTuple):
    """A view of a gathered weight, as autograd keeps it: without values."""

    store: FsdpWeight
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


# The weights that were gathered in a block of ``gathered_again``, by their memory.
_gathered: ContextVar[dict[StorageWeakRef, FsdpWeight] | None]
_gathered = ContextVar("gathered", default=None)


def _pack(saved: Tensor) -> Tensor | _Saved:
    store = (_gathered.get() or {}).get(StorageWeakRef(saved.untyped_storage()))
    if store is None:
        return saved
    return _Saved(store, saved.shape, saved.stride(), int(saved.storage_offset()))


def _unpack(saved: Tensor | _Saved) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    return saved.store.dense().as_strided(saved.shape, saved.stride, saved.offset)


@contextmanager
def gathered_again() -> Iterator[None]:
    """Let autograd save no weight that is gathered in the block; backward gathers it again.

    For eager devices.  Inside a block that is recomputed nothing is saved anyway.
    """
    before = _gathered.set({})
    try:
        with saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _gathered.reset(before)
