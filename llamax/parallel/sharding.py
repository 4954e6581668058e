"""How one parameter is cut over tensor-parallel ranks: pure arithmetic, on plain integers.

A parameter is a ``Replica`` (every rank holds it whole) or a ``Shard``: cut along one dim, made of
*blocks*.  A plain weight is one block; a fused one stacks several, each cut for itself, so a
rank's share of a fused query-key-value weight is again [its queries, its keys, its values]::

    whole  [ q0 q1 q2 q3 | k0 k1 | v0 v1 ]      blocks q (4 heads), k (2), v (2)
    rank 0 [ q0 q1       | k0    | v0    ]      degree 2
    rank 1 [ q2 q3       | k1    | v1    ]

A block counts in *units* that never part (a head, a row).  Three cases, for n units over p ranks:

* p divides n: each rank holds n / p units;
* n divides p: p / n neighbouring ranks hold one unit together (more ranks than key/value heads);
* ``pad`` (the vocabulary): n is rounded up to a multiple of p with rows of zeros that no file ever
  sees, so ``join`` gives the unpadded whole again.

All of this is arithmetic on (block, degree, rank), so a checkpoint needs no topology: any degree is
turned into any other by the rows that its ranks have in common (``llamax.checkpoint.runs``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llamax.parallel.fsdp import Store
from llamax.parallel.weight_gradient import GradientSum
from llamax.runtime.errors import ConfigError


@dataclass(frozen=True)
class Block:
    """``size`` rows of the whole, cut in multiples of ``unit``; ``name`` is its Hub projection."""

    size: int
    unit: int = 1
    name: str = ""
    pad: bool = False


class Span(NamedTuple):
    """Rows [start, start + length) of a whole block, then ``pad`` rows of zeros."""

    start: int
    length: int
    pad: int

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Replica:
    """Held whole by every rank of the axis.

    ``partial``: whether each rank sees a part of its gradient, so that these are summed; None: with
    sequence parallelism, as for a parameter that acts on activations between parallel layers.
    """

    partial: bool | None = None


@dataclass(frozen=True)
class Shard:
    """Cut along ``dim``, block by block."""

    dim: int
    blocks: tuple[Block, ...]


Cut = Shard | Replica


def span(block: Block, degree: int, rank: int) -> Span:
    """The rows of ``block`` that ``rank`` of ``degree`` holds.

    Raises ConfigError where none of the three cases applies.
    """
    units = block.size // block.unit
    if units % degree == 0:
        each = units // degree * block.unit
        return Span(rank * each, each, 0)
    if block.pad:
        each = -(-units // degree) * block.unit
        start = min(rank * each, block.size)
        stop = min(start + each, block.size)
        return Span(start, stop - start, each - (stop - start))
    if degree % units == 0:
        return Span(rank * units // degree * block.unit, block.unit, 0)
    raise ConfigError(
        f"tensor degree {degree} neither divides nor is a multiple of the {units} units of "
        f"{block.name or 'this parameter'}; use a divisor of {units}"
    )


def replicas(block: Block, degree: int) -> int:
    """How many neighbouring ranks hold the same rows of ``block``: 1 unless degree > units."""
    units = block.size // block.unit
    return degree // units if degree > units and not block.pad else 1


def cut(whole: Tensor, how: Cut, degree: int, rank: int) -> Tensor:
    """This rank's share of a whole tensor, as a new contiguous tensor."""
    if isinstance(how, Replica):
        return whole.clone()
    pieces, offset = [], 0
    for block in how.blocks:
        start, length, pad = span(block, degree, rank)
        pieces.append(whole.narrow(how.dim, offset + start, length))
        if pad:
            shape = list(whole.shape)
            shape[how.dim] = pad
            pieces.append(whole.new_zeros(shape))
        offset += block.size
    return torch.cat(pieces, how.dim)


def join(shares: Sequence[Tensor], how: Cut) -> Tensor:
    """The whole tensor from the shares of all ranks, in rank order: the inverse of ``cut``."""
    if isinstance(how, Replica):
        return shares[0].clone()
    degree, pieces, offset = len(shares), [], 0
    for block in how.blocks:
        for rank in range(0, degree, replicas(block, degree)):
            pieces.append(shares[rank].narrow(how.dim, offset, span(block, degree, rank).length))
        offset += sum(span(block, degree, 0)[1:])
    return torch.cat(pieces, how.dim)


def local_shape(whole: Sequence[int], how: Cut, degree: int) -> tuple[int, ...]:
    """The shape of one rank's share of a tensor of shape ``whole`` (the same on every rank)."""
    shape = list(whole)
    if isinstance(how, Shard):
        shape[how.dim] = sum(sum(span(block, degree, 0)[1:]) for block in how.blocks)
    return tuple(shape)


class Part(NamedTuple):
    """One Hub tensor in a (possibly fused) parameter, and where its rows lie in a rank's share."""

    name: str
    how: Cut
    start: int
    length: int


def parts(name: str, how: Cut, degree: int) -> Iterator[Part]:
    """The Hub tensors that a parameter holds: itself, or the blocks of a fused projection.

    ``model.layers.0.self_attn.qkv_proj.weight`` gives ``...q_proj.weight``, ``...k_proj.weight``
    and ``...v_proj.weight``; ``start`` and ``length`` count rows of a rank's share along the cut
    dim (-1 for a replica, which has no cut dim).
    """
    if isinstance(how, Replica):
        yield Part(name, how, 0, -1)
        return
    offset = 0
    for block in how.blocks:
        length = sum(span(block, degree, 0)[1:])
        owner, _, leaf = name.rpartition(".")
        hub = f"{owner.rpartition('.')[0]}.{block.name}.{leaf}" if block.name else name
        yield Part(hub, Shard(how.dim, (block,)), offset, length)
        offset += length


def whole_shape(how: Cut, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a Hub tensor, given how it is cut and the shape of any rank's share."""
    if isinstance(how, Replica):
        return tuple(shape)
    (block,) = how.blocks
    return (*shape[: how.dim], block.size, *shape[how.dim + 1 :])


# --- the parameters of a model -------------------------------------------------------------------


def declared_cut(owner: object, name: str, leaf: str, shape: Sequence[int], degree: int) -> Cut:
    """How parameter ``leaf`` of the module ``owner`` is cut, as the module's ``shard`` says.

    ``shard`` is one cut for all parameters of the module or a mapping from their names; a parameter
    without one is a replica.  ``name`` is the parameter's name in the model and ``shape`` that of
    this rank's share.  Raises ConfigError for a shape that is no share of the cut.
    """
    declared = getattr(owner, "shard", None)
    how = declared.get(leaf) if isinstance(declared, Mapping) else declared
    if how is None or isinstance(how, Replica):
        return how or Replica()
    if not isinstance(how, Shard) or how.dim > 1 or (how.dim == 1 and len(how.blocks) > 1):
        raise ConfigError(
            f"the module of {name} has shard = {how!r:.200}; use Replica() or Shard(dim, blocks) "
            "with dim 0, or with dim 1 and a single block"
        )
    length = sum(sum(span(block, degree, 0)[1:]) for block in how.blocks)
    if len(shape) <= how.dim or shape[how.dim] != length:
        raise ConfigError(
            f"{name} is {list(shape)}, but its module declares {length} rows of dim {how.dim} on "
            f"each of {degree} tensor ranks; give the module shard = "
            f'{{"{leaf}": Replica(), ...}} with the cut of every parameter'
        )
    return how


class ShardedParameter(NamedTuple):
    """A parameter's share on one rank, and how the whole is cut."""

    tensor: Tensor
    cut: Cut


class Storing(Protocol):
    """A layer that takes its weight from a store, and adds its gradient to a sum, where given."""

    store: Store | None
    gradient_sum: GradientSum | None


class ShardedParameters(Mapping[str, ShardedParameter]):
    """The parameters that one tensor-parallel rank holds, by name, each with its cut.

    ``degree`` and ``rank`` are those of the axis.  A model makes it once
    (``Llama.sharded_parameters``); optimizer and checkpoints need to know no more about a model.
    ``holds`` says which names of a whole model belong to this stage of a pipeline, ``tied`` which
    the first and the last stage both hold; ``layers`` are the layers, by the names of their
    weights, that can take these from a store.
    """

    def __init__(
        self,
        parameters: Mapping[str, ShardedParameter],
        degree: int = 1,
        rank: int = 0,
        holds: Callable[[str], bool] = lambda name: True,
        layers: Mapping[str, Storing] = MappingProxyType({}),
        tied: Collection[str] = (),
    ) -> None:
        self._parameters, self.degree, self.rank = dict(parameters), degree, rank
        self.holds, self.layers, self.tied = holds, layers, tied

    def __getitem__(self, name: str) -> ShardedParameter:
        return self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors alone, by name."""
        return {name: parameter.tensor for name, parameter in self.items()}

    @property
    def cuts(self) -> dict[str, Cut]:
        """The cuts alone, by name."""
        return {name: parameter.cut for name, parameter in self.items()}

    def trained(self) -> ShardedParameters:
        """Those that require a gradient: what an optimizer updates and a checkpoint keeps."""
        return self.only([name for name, p in self.items() if p.tensor.requires_grad])

    def only(self, names: Iterable[str]) -> ShardedParameters:
        """Those of these names."""
        kept = {name: self[name] for name in names}
        return ShardedParameters(kept, self.degree, self.rank, self.holds, self.layers, self.tied)

    def parts(self, name: str) -> Iterator[Part]:
        """The Hub tensors that one parameter holds."""
        yield from parts(name, self[name].cut, self.degree)

    def hub_cuts(self) -> dict[str, Cut]:
        """How each Hub tensor is cut, by its name on the Hub."""
        return {part.name: part.how for name in self for part in self.parts(name)}

    def hub_shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole shape of each Hub tensor, by its name on the Hub."""
        return {
            part.name: whole_shape(part.how, parameter.tensor.shape)
            for name, parameter in self.items()
            for part in self.parts(name)
        }
