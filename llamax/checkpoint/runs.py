"""Where the elements of a tensor lie in files, whoever wrote them: pure arithmetic.

Seen as a matrix (its first dim by all others), a tensor is cut into *strips* of columns, and a
strip into *runs* of elements in row-major order.  That describes every owner there is::

    cut along dim 0, tp 2          cut along dim 1, tp 2         and over data ranks (ZeRO-1)
    +-----------+                  +-----+-----+                 each strip's elements are dealt
    | tp 0      |  one strip,      |     |     |  two strips     out in runs, wherever a bucket
    +-----------+  two runs        |tp 0 | tp 1|                 happens to end
    | tp 1      |                  |     |     |
    +-----------+                  +-----+-----+

A run needs no topology to be understood, so to reshard is to intersect two runs: ``overlaps`` says
which elements of a stored run go where in a wanted one.  Weights, masters and moments, tensor and
data ranks, whole Hub tensors: all are runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from llamax.parallel.sharding import Cut, Replica, Shard, parts, replicas, span


class Run(NamedTuple):
    """Elements [start, start + length), row by row, of the columns [left, left + width)."""

    left: int
    width: int
    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


class Copy(NamedTuple):
    """``rows`` x ``columns`` elements: offset and stride in the source run, then in the target."""

    rows: int
    columns: int
    source: int
    source_stride: int
    target: int
    target_stride: int


class Box(NamedTuple):
    """A rectangle of the matrix, and where its first element lies in the run it is a part of."""

    top: int
    bottom: int
    left: int
    right: int
    offset: int


class Slice(NamedTuple):
    """Part of a rank's flat piece of a parameter: ``run`` of Hub tensor ``name``, at ``offset``."""

    name: str
    run: Run
    offset: int


def columns(shape: Sequence[int]) -> int:
    """The width of a tensor seen as a matrix."""
    return math.prod(shape[1:])


def whole(shape: Sequence[int]) -> Run:
    """All elements of a tensor."""
    return Run(0, columns(shape), 0, math.prod(shape))


def boxes(run: Run) -> Iterator[Box]:
    """A run as at most three rectangles: the rest of a row, full rows, the start of a row."""
    at = run.start
    while at < run.stop:
        top, column = divmod(at, run.width)
        if column or run.stop - at < run.width:
            bottom, right = top + 1, min(run.width, column + run.stop - at)
        else:
            bottom, right = run.stop // run.width, run.width
        yield Box(top, bottom, run.left + column, run.left + right, at - run.start)
        at += (bottom - top - 1) * run.width + right - column


def overlaps(source: Run, target: Run) -> Iterator[Copy]:
    """The elements that two runs share, as copies from the source into the target."""
    if (source.left, source.width) == (target.left, target.width):
        start, stop = max(source.start, target.start), min(source.stop, target.stop)
        if start < stop:
            n = stop - start
            yield Copy(1, n, start - source.start, n, start - target.start, n)
        return
    if source.left >= target.left + target.width or target.left >= source.left + source.width:
        return
    for a in boxes(source):
        for b in boxes(target):
            top, bottom = max(a.top, b.top), min(a.bottom, b.bottom)
            left, right = max(a.left, b.left), min(a.right, b.right)
            if top < bottom and left < right:
                yield Copy(
                    bottom - top,
                    right - left,
                    a.offset + (top - a.top) * source.width + left - a.left,
                    source.width,
                    b.offset + (top - b.top) * target.width + left - b.left,
                    target.width,
                )


def tiled(shape: Sequence[int], runs: Sequence[Run]) -> bool:
    """Whether runs cover every element of a tensor exactly once."""
    strips: dict[tuple[int, int], list[Run]] = {}
    for run in runs:
        strips.setdefault((run.left, run.width), []).append(run)
    right = 0
    for (left, width), dealt in sorted(strips.items()):
        at = 0
        for run in sorted(dealt):
            if run.start != at or run.length < 1:
                return False
            at = run.stop
        if left != right or width < 1 or at != shape[0] * width:
            return False
        right += width
    return right == columns(shape)


def slices(
    name: str, how: Cut, shape: Sequence[int], degree: int, rank: int, start: int, length: int
) -> Iterator[Slice]:
    """What elements [start, start + length) of a rank's share of a parameter are, as Hub tensors.

    ``shape`` may be that of the share or of the whole: only its dims after the first count, and
    these differ for a cut along dim 1 alone, where the cut itself says the width.  Padding is no
    part of any Hub tensor and left out.
    """
    for part in parts(name, how, degree):
        if isinstance(part.how, Shard):
            (block,) = part.how.blocks
            mine = span(block, degree, rank)
            if part.how.dim == 1:
                strip, first, here, elements = (mine.start, mine.length), 0, 0, start + length
            else:
                width = columns(shape)
                strip, first = (0, width), mine.start * width
                here, elements = part.start * width, mine.length * width
        else:
            strip, first, here, elements = (0, columns(shape)), 0, 0, start + length
        low, high = max(start, here), min(start + length, here + elements)
        if low < high:
            yield Slice(part.name, Run(*strip, first + low - here, high - low), low - start)


def writes(how: Cut, degree: int, rank: int) -> bool:
    """Whether this tensor rank is the first of those that hold the same elements."""
    if isinstance(how, Replica):
        return rank == 0
    (block,) = how.blocks
    return rank % replicas(block, degree) == 0
