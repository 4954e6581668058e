"""Loading: a source of Hub tensors fills the live tensors of any rank of any mesh.

A ``Source`` knows, per tensor, which run lies where (``pieces``); filling a wanted run is
intersecting it with those, so a rank reads the bytes it needs and no others, one tensor at a time.
``Checkpoint`` is the source that training wrote, ``hub.HfFolder`` one from elsewhere.

Numbers keep their value: a dtype is widened where a tensor wants more, and rounding is refused
unless asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llamax.checkpoint.runs import slices
from llamax.checkpoint.source import Source
from llamax.parallel.sharding import Cut, local_shape, parts, whole_shape
from llamax.runtime.errors import CheckpointError


class Owned(Protocol):
    """A flat run of a parameter (or of its state) that a rank owns; see ``llamax.optim.zero1``."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def tensor(self) -> Tensor: ...


class Whole(NamedTuple):
    """All of a rank's share of a parameter, as an ``Owned``."""

    name: str
    tensor: Tensor
    kind: str = "weight"
    start: int = 0


def load_weights(
    source: Source,
    parameters: Mapping[str, Tensor],
    shards: Mapping[str, Cut],
    tp_degree: int = 1,
    tp_rank: int = 0,
    convert: bool = False,
) -> None:
    """Fill a model's parameters with this tensor rank's share of a source's weights.

    A float32 parameter takes the float32 master where the source keeps one.  ``convert`` allows
    rounding.  Raises CheckpointError where names or shapes differ: the first that does.
    """
    check_shapes(source, parameters, shards, tp_degree)
    for name, parameter in parameters.items():
        flat = parameter.detach().view(-1)
        _fill(source, name, "weight", flat, 0, shards[name], tp_degree, tp_rank, convert)


def load_owned(
    source: Source,
    owned: Iterable[Owned],
    shards: Mapping[str, Cut],
    tp_degree: int = 1,
    tp_rank: int = 0,
    convert: bool = False,
) -> None:
    """Fill what a rank owns (weights, masters, moments), whatever mesh the source was saved on.

    Masters missing from a float32 run are its weights.  Raises CheckpointError for what is absent.
    """
    for mine in owned:
        how, flat = shards[mine.name], mine.tensor.detach()
        _fill(source, mine.name, mine.kind, flat, mine.start, how, tp_degree, tp_rank, convert)


def check_shapes(
    source: Source, parameters: Mapping[str, Tensor], shards: Mapping[str, Cut], tp_degree: int = 1
) -> None:
    """Refuse a source whose tensors are not those of the model, naming the first that differs."""
    expected = {
        part.name: whole_shape(part.how, parameter.shape)
        for name, parameter in parameters.items()
        for part in parts(name, shards[name], tp_degree)
    }
    found = source.names()
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"{source.folder} has no {name}, which the model has; {_REMEDY}")
        if source.shape(name) != shape:
            raise CheckpointError(
                f"{source.folder}: {name} is {list(source.shape(name))}, the model's is "
                f"{list(shape)}; {_REMEDY}"
            )
    for name in found:
        if name not in expected:
            raise CheckpointError(f"{source.folder} has {name}, which the model lacks; {_REMEDY}")


_REMEDY = "give the model section the values of the folder's own configuration"


def _fill(
    source: Source,
    name: str,
    kind: str,
    flat: Tensor,
    start: int,
    how: Cut,
    tp_degree: int,
    tp_rank: int,
    convert: bool,
) -> None:
    for part in parts(name, how, tp_degree):
        if part.name not in source.names():
            raise CheckpointError(f"{source.folder} has no {part.name}; {_REMEDY}")
        shape = source.shape(part.name)
        if shape != whole_shape(part.how, shape):
            raise CheckpointError(
                f"{source.folder}: {part.name} is {list(shape)}, the model's is "
                f"{list(whole_shape(part.how, shape))}; {_REMEDY}"
            )
    elements = math.prod(local_shape(shape, how, tp_degree))
    if start + len(flat) > elements:
        raise CheckpointError(
            f"{source.folder}: a rank's share of {name} has {elements} elements, the model's has "
            f"more; {_REMEDY}"
        )
    end = 0  # what lies between slices, and after the last, is padding
    for hub, run, offset in slices(name, how, shape, tp_degree, tp_rank, start, len(flat)):
        flat[end:offset].zero_()
        end = offset + run.length
        source.fill(hub, _kind(source, hub, kind, flat.dtype), run, flat[offset:end], convert)
    flat[end:].zero_()


def _kind(source: Source, name: str, kind: str, dtype: torch.dtype) -> str:
    kept = source.kinds(name)
    if kind in ("weight", "master"):
        return "master" if "master" in kept and dtype == torch.float32 else "weight"
    if kind not in kept:
        raise CheckpointError(
            f"{source.folder} holds no {kind} of {name}: it has weights only; "
            "start from it with checkpoint.init_from"
        )
    return kind
