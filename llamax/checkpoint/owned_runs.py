"""Which runs of Hub tensors a tensor rank holds, and which of them it writes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from llamax.checkpoint.runs import Run, row_width
from llamax.parallel.sharding import Cut, Replica, Shard, ShardedParameters, replicas, span


class Slice(NamedTuple):
    """A run of Hub tensor ``name``, found at ``offset`` of a rank's flat range of elements."""

    name: str
    run: Run
    offset: int


def slices(parameters: ShardedParameters, name: str, start: int, length: int) -> Iterator[Slice]:
    """The Hub runs behind elements [start, start + length) of a rank's flat share of a parameter.

    Padding belongs to no Hub tensor and is left out.
    """
    shape = parameters[name].tensor.shape
    for part in parameters.parts(name):
        if isinstance(part.how, Shard):
            (block,) = part.how.blocks
            rows = span(block, parameters.degree, parameters.rank)
            if part.how.dim == 1:
                inner = math.prod(shape[2:])
                strip, first = (rows.start * inner, rows.length * inner), 0
                begin, elements = 0, start + length
            else:
                width = row_width(shape)
                strip, first = (0, width), rows.start * width
                begin, elements = part.start * width, rows.length * width
        else:
            strip, first, begin, elements = (0, row_width(shape)), 0, 0, start + length
        low, high = max(start, begin), min(start + length, begin + elements)
        if low < high:
            yield Slice(part.name, Run(*strip, first + low - begin, high - low), low - start)


def is_writer(how: Cut, degree: int, rank: int) -> bool:
    """Whether this tensor rank writes its share: the first rank of those with the same elements."""
    if isinstance(how, Replica):
        return rank == 0
    (block,) = how.blocks
    return rank % replicas(block, degree) == 0
