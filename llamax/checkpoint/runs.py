"""Runs: which elements of a tensor a file or a rank holds, as plain integers.

A tensor counts as a matrix (its first dim by all others; a scalar is 1 by 1).  It is cut into
*strips* of columns, and a strip into *runs* of elements in row-major order.  This describes every
way to share a tensor::

    cut along dim 0, tp 2          cut along dim 1, tp 2         and over data ranks (ZeRO-1)
    +-----------+                  +-----+-----+                 each strip is split further
    | tp 0      |  one strip,      |     |     |  two strips     into runs that end where
    +-----------+  two runs        |tp 0 | tp 1|                 optimizer buckets end
    | tp 1      |                  |     |     |
    +-----------+                  +-----+-----+

A run means the same on every mesh, so resharding is intersecting runs: ``overlaps`` lists which
elements of a stored run go where in a wanted run.  Weights, masters and moments, the shares of
tensor and data ranks, and whole Hub tensors are all described by runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Run(NamedTuple):
    """Elements [start, start + length), row by row, of the columns [left, left + width)."""

    left: int
    width: int
    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


class StridedCopy(NamedTuple):
    """A copy of ``rows`` x ``columns`` elements; offsets and strides count elements.

    ``source`` and ``target`` are offsets from the start of the source and of the target run.
    """

    rows: int
    columns: int
    source: int
    source_stride: int
    target: int
    target_stride: int


class Box(NamedTuple):
    """A rectangle of the matrix; ``offset``: of its first element from the start of the run."""

    top: int
    bottom: int
    left: int
    right: int
    offset: int


def row_width(shape: Sequence[int]) -> int:
    """The number of columns of a tensor as a matrix: the product of all dims but the first."""
    return math.prod(shape[1:])


def whole_run(shape: Sequence[int]) -> Run:
    """The run of all elements of a tensor."""
    return Run(0, row_width(shape), 0, math.prod(shape))


def boxes(run: Run) -> Iterator[Box]:
    """A run as at most three rectangles: the end of a row, full rows, the start of a row."""
    at = run.start
    while at < run.stop:
        top, column = divmod(at, run.width)
        if column or run.stop - at < run.width:
            bottom, right = top + 1, min(run.width, column + run.stop - at)
        else:
            bottom, right = run.stop // run.width, run.width
        yield Box(top, bottom, run.left + column, run.left + right, at - run.start)
        at += (bottom - top - 1) * run.width + right - column


def overlaps(source: Run, target: Run) -> Iterator[StridedCopy]:
    """The copies from a source run to a target run of all elements that both contain."""
    if (source.left, source.width) == (target.left, target.width):
        start, stop = max(source.start, target.start), min(source.stop, target.stop)
        if start < stop:
            n = stop - start
            yield StridedCopy(1, n, start - source.start, n, start - target.start, n)
        return
    if source.left >= target.left + target.width or target.left >= source.left + source.width:
        return
    for a in boxes(source):
        for b in boxes(target):
            top, bottom = max(a.top, b.top), min(a.bottom, b.bottom)
            left, right = max(a.left, b.left), min(a.right, b.right)
            if top < bottom and left < right:
                yield StridedCopy(
                    bottom - top,
                    right - left,
                    a.offset + (top - a.top) * source.width + left - a.left,
                    source.width,
                    b.offset + (top - b.top) * target.width + left - b.left,
                    target.width,
                )
