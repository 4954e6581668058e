"""Where every parameter lies in flat vectors, and how often the whole model counts its elements.

Parameters that are treated alike share one flat vector, a *group*; a group is cut into *buckets* of
equal length, and a bucket into one *shard* per data rank, which that rank owns::

    group   [ parameter 0 | parameter 1       | parameter 2 |pad]
    bucket  [ 0         | 1         | 2         | 3         ]
    shard   [ r0 | r1   | r0 | r1   | r0 | r1   | r0 | r1   ]       2 data ranks

The global gradient norm counts each element of the whole model once, so an element that n tensor
ranks hold has weight 1/n: a replica, or a key/value head with more ranks than heads.  Rows that
only pad the vocabulary have weight 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from math import prod
from typing import NamedTuple

from llamax.config.constants import GRADIENT_BYTES
from llamax.parallel.sharding import Cut, Replica, replicas, span


class Segment(NamedTuple):
    """``length`` consecutive elements of this rank's share of a parameter that count alike.

    ``weight``: how much of each the norm counts; ``shared``: neighbouring tensor ranks hold the
    same elements and see a part of their gradient each.
    """

    length: int
    weight: float
    shared: bool


class Piece(NamedTuple):
    """Elements [start, stop) of the group's flat parameter number ``member``.

    ``part``: their place in the stretch of the group that was asked for.
    """

    member: int
    start: int
    stop: int
    part: slice


class Bucket(NamedTuple):
    """Elements [start, stop) of a group's flat vector."""

    start: int
    stop: int


def segments(shape: Sequence[int], how: Cut, degree: int, rank: int) -> list[Segment]:
    """How the elements of this rank's share, of local shape ``shape``, are counted, in flat order.

    Lengths do not depend on ``rank`` except for padding.
    """
    if isinstance(how, Replica):
        return [Segment(prod(shape), 1 / degree, False)]
    inner = prod(shape[how.dim + 1 :])
    row: list[Segment] = []
    for block in how.blocks:
        held_by = replicas(block, degree)
        _, length, pad = span(block, degree, rank)
        row.append(Segment(length * inner, 1 / held_by, held_by > 1))
        row.append(Segment(pad * inner, 0.0, False))
    count, row = prod(shape[: how.dim]), _joined(row)
    if len(row) == 1:
        return [row[0]._replace(length=row[0].length * count)]
    return _joined(row * count)


def _joined(found: Sequence[Segment]) -> list[Segment]:
    """Segments as few as possible: neighbours that count alike are one, and empty ones go."""
    held = (segment for segment in found if segment.length)
    return [
        Segment(sum(segment.length for segment in alike), weight, shared)
        for (weight, shared), alike in groupby(held, key=lambda segment: segment[1:])
    ]


def weight(how: Cut, degree: int) -> float | None:
    """The weight of every element on every rank, or None where they differ."""
    if isinstance(how, Replica):
        return 1 / degree
    weights = {1 / replicas(block, degree) for block in how.blocks}
    padded = any(span(block, degree, degree - 1).pad for block in how.blocks)
    return None if padded or len(weights) > 1 else weights.pop()


def padded(length: int, unit: int) -> int:
    """``length`` rounded up to a multiple of ``unit``."""
    return -(-length // unit) * unit


def buckets(length: int, unit: int, bucket_bytes: int) -> Iterator[Bucket]:
    """The buckets of a group of padded ``length``.

    Each is a multiple of ``unit`` long, and its gradient takes at most ``bucket_bytes`` or is one
    unit: an element, or a block of them, for each rank.
    """
    size = max(bucket_bytes // GRADIENT_BYTES // unit, 1) * unit
    for start in range(0, length, size):
        yield Bucket(start, min(start + size, length))


def pieces(lengths: Sequence[int], start: int, stop: int) -> Iterator[Piece]:
    """The pieces of parameters at [start, stop) of a vector that concatenates ``lengths``."""
    offset = 0
    for member, length in enumerate(lengths):
        low, high = max(start, offset), min(stop, offset + length)
        if low < high:
            yield Piece(member, low - offset, high - offset, slice(low - start, high - start))
        offset += length


def shared_spans(counted: Sequence[Segment], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Which elements of bucket [start, stop) are ``shared``, counted from its start."""
    for piece in pieces([segment.length for segment in counted], start, stop):
        if counted[piece.member].shared:
            yield piece.part.start, piece.part.stop
