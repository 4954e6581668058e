"""Tensors cut over data ranks, gathered when they are used and dropped after.

::

    data rank 0  [ run ] ──┐                      ┌──> dense weight, for one product
                           ├── gather when used ──┤
    data rank 1  [ run ] ──┘                      └──> its gradient ── reduce-scatter ──> [ run ]

``Spread`` is the cut: a flat tensor in runs of equal length, the last one padded.  The quantised
base of QLoRA keeps its bytes so.  ``SpreadWeight`` is a dense weight on top of it, frozen or with a
gradient (ZeRO-3, Rajbhandari et al. 2020, section 5.3; FSDP, Zhao et al. 2023).  It is gathered in
forward and again in backward, so no rank keeps a whole weight: where layers are recomputed they
gather again, and elsewhere ``gathered_again`` keeps autograd from saving what was gathered.

No rank holds all weights whole before they are cut either: a ``Placeholder`` stands for a weight
that has no values yet, and these are drawn or read a run at a time, when the run is made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
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
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from llamax.parallel import regions
from llamax.parallel.collectives import Axis
from llamax.parallel.prefetch import Prefetch
from llamax.parallel.reductions import Reductions
from llamax.runtime.errors import ConfigError


class Store(Protocol):
    """A weight that has to be made before it can be used."""

    def weight(self) -> Tensor:
        """This tensor rank's share, dense, in the dtype of computation: [f, D]."""
        ...


# Fills a contiguous flat tensor with the elements of a weight from this place on.
Values = Callable[[Tensor, int], None]


class Spread:
    """A flat tensor cut over the ranks of ``shard``, one run each; ``gather`` joins the runs.

    Its ``length`` elements are ``values``, of the dtype and on the device of ``like``; None: zeros.
    Runs are a multiple of ``unit`` elements.
    """

    def __init__(
        self, length: int, values: Values | None, shard: Axis, like: Tensor, unit: int = 1
    ) -> None:
        self.shard, self.length = shard, length
        run = ceil(length / (shard.size * unit)) * unit
        start = min(shard.rank * run, length)
        self.run = like.new_zeros(run)
        if values is not None:
            values(self.run[: min(run, length - start)], start)

    @classmethod
    def joined(cls, pieces: list[Tensor], shard: Axis, device: torch.device) -> Spread:
        """The pieces end to end, cut."""
        whole = torch.cat([piece.flatten() for piece in pieces])
        return cls(len(whole), values_of(whole), shard, whole.new_empty(0, device=device))

    def gather(self) -> Tensor:
        return self.shard.all_gather(self.run, 0)[: self.length]

    def start_gather(self) -> Callable[[], Tensor]:
        """Begin ``gather``; the function returned waits for it."""
        arrived = self.shard.start_all_gather(self.run)
        return lambda: arrived()[: self.length]

    def start_reduce(self, whole: Tensor) -> Callable[[], Tensor]:
        """Begin to sum ``whole`` [n] over ``shard`` in float32; the wait returns the run of it."""
        if padding := self.shard.size * len(self.run) - self.length:
            whole = torch.nn.functional.pad(whole, (0, padding))
        return self.shard.start_reduce_scatter(whole.float())


def values_of(whole: Tensor) -> Values:
    """The elements of a tensor that exists."""
    flat = whole.reshape(-1)

    def copy(into: Tensor, start: int) -> None:
        into.copy_(flat[start : start + len(into)])

    return copy


class _Gather(torch.autograd.Function):
    """The whole weight of a run; backward sums its gradient over ``shard``."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, store: SpreadWeight) -> Tensor:
        ctx.store = store
        return store.dense()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dw: Tensor) -> tuple[None, None]:
        ctx.store.add_gradient(dw)
        return None, None


class SpreadWeight:
    """A weight of which each rank of ``shard`` keeps a run; a ``Store``.

    A ``trained`` one sums its gradient over them into ``gradient``, a float32 run: at once, or by
    ``reductions`` while backward goes on.
    A placeholder is made here, its run alone.
    """

    def __init__(self, weight: Tensor, shard: Axis, trained: bool, unit: int = 1) -> None:
        self.shape, device = weight.shape, weight.device
        if isinstance(weight, Placeholder):
            assert weight.home is not None, "it has runs already"
            values, device = weight.initial, weight.home
        else:
            values = values_of(weight.detach())
        like = torch.empty(0, dtype=weight.dtype, device=device)
        self.spread = Spread(weight.numel(), values, shard, like, unit)
        self.gradient: Tensor | None = None
        self.prefetch: Prefetch | None = None
        self.reductions: Reductions | None = None
        if trained:
            self.gradient = torch.zeros(len(self.run), dtype=torch.float32, device=device)
            self._leaf = torch.zeros((), requires_grad=True)  # so that backward comes by

    @property
    def run(self) -> Tensor:
        """The elements that this rank keeps, with padding."""
        return self.spread.run

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
        whole = self.spread.gather() if self.prefetch is None else self.prefetch.gather(self.spread)
        return whole.view(self.shape)

    def add_gradient(self, dw: Tensor) -> None:
        """Add this rank's run of the sum of ``dw`` over ``shard``."""
        assert self.gradient is not None
        start = partial(self.spread.start_reduce, dw.reshape(-1))
        if self.reductions is None:
            self.gradient.add_(start()())
        else:
            self.reductions.add(self.gradient, start)


def spread_weights(model: nn.Module) -> Iterator[SpreadWeight]:
    """The weights of a model that are cut over the data ranks."""
    for module in model.modules():
        store = getattr(module, "store", None)
        if isinstance(store, SpreadWeight):
            yield store


def prefetched(model: nn.Module) -> Prefetch:
    """Let the spread weights of a model on an eager device be gathered ahead of their use."""
    prefetch = Prefetch()
    for weight in spread_weights(model):
        if weight.run.device.type != "xla":
            weight.prefetch = prefetch
    return prefetch


class _Saved(NamedTuple):
    """A view of a gathered weight, as autograd keeps it: without values."""

    store: SpreadWeight
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


# The weights that were gathered in a block of ``gathered_again``, by their memory.
_gathered: ContextVar[dict[StorageWeakRef, SpreadWeight] | None]
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


class Placeholder(Parameter):
    """A weight that lies in runs on the data ranks: name, shape and dtype, on the meta device.

    Before it is cut it has a ``home``, where its runs will be, and perhaps ``initial`` values.
    Raises ConfigError where values of it are asked for, or changed; torch would compute with
    whatever memory holds, and change nothing.
    """

    weight_name = "a weight"
    home: torch.device | None = None
    initial: Values | None = None

    @staticmethod
    def replace(weight: Parameter, name: str, home: torch.device | None = None) -> None:
        """Make ``weight`` a placeholder: every reference to it follows."""
        shape = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        placeholder = Placeholder(shape, weight.requires_grad)
        placeholder.weight_name, placeholder.home = name, home
        torch.utils.swap_tensors(weight, placeholder)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ConfigError(
            f"{self.weight_name} cannot be pickled, because each data rank keeps a run of it with "
            "parallel.zero=3; load a checkpoint for whole weights, or use parallel.zero=2"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = next(leaf.weight_name for leaf in tensors if isinstance(leaf, Placeholder))
        called = func.__name__
        if changes(called):
            raise ConfigError(
                f"{called} would change {name}, of which each data rank keeps a run with "
                "parallel.zero=3; change the runs that the optimizer's owned() gives, or use "
                "parallel.zero=2"
            )
        try:
            if not all(isinstance(leaf, Placeholder) or leaf.is_meta for leaf in tensors):
                raise NotImplementedError("not on the meta device")
            result = Tensor.__torch_function__.__func__(  # type: ignore[attr-defined]
                cls, func, types, args, kwargs or {}
            )
        except (RuntimeError, NotImplementedError) as error:
            raise ConfigError(
                f"{called} reads {name}, of which each data rank keeps a run with "
                "parallel.zero=3; use layer.dense(), which gathers it, in place of layer.weight, "
                "or parallel.zero=2"
            ) from error
        if isinstance(result, Placeholder):
            result.weight_name = name
        return result


def changes(method: str) -> bool:
    """Whether a method of a tensor, by its name, changes its values in place."""
    in_place = method.endswith("_") and not method.endswith("__")
    return (in_place and method != "requires_grad_") or method == "__setitem__"


def set_values(weight: Tensor, values: Values) -> None:
    """Give a weight its values: at once, or where it is a placeholder, when its run is made.

    Raises ConfigError where it has runs already.
    """
    if not isinstance(weight, Placeholder):
        values(weight.detach().view(-1), 0)
    elif weight.home is None:
        raise ConfigError(
            f"{weight.weight_name} lies in runs on the data ranks; give it values before the "
            "optimizer is made, or through the optimizer's owned()"
        )
    else:
        weight.initial = values


def make_weights(model: nn.Module, later: Collection[str], like: Tensor) -> None:
    """Make the weights of a model that was built on the meta device, uninitialised, like ``like``.

    Those named in ``later`` become placeholders.
    """
    for name, weight in [*model.named_parameters()]:
        if not weight.is_meta or isinstance(weight, Placeholder):
            continue
        if name in later:
            Placeholder.replace(weight, name, like.device)
        else:
            made = Parameter(like.new_empty(weight.shape), weight.requires_grad)
            torch.utils.swap_tensors(weight, made)
