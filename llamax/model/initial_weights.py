"""Draws initial weights that are the same on every mesh: each whole from a stream of its own.

A whole tensor is drawn some rows at a time, so that no rank holds more of it than it keeps.  torch
makes normal numbers from its stream in blocks of 16, and draws the last 16 of a tensor again where
its size is no multiple: rows drawn together are whole blocks, and the last ones include these 16.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from llamax.parallel.placeholder import set_values
from llamax.parallel.sharding import Replica, ShardedParameters, Span, cut, span

BLOCK = 16  # elements that torch makes of its stream together
AT_ONCE = 2**20  # elements drawn together, about


def draw(parameters: ShardedParameters, name: str, deviation: float, seed: int) -> None:
    """Give this rank's share of a cut matrix values from N(0, deviation)."""
    set_values(parameters[name].tensor, partial(_draw, parameters, name, deviation, seed))


def _draw(
    parameters: ShardedParameters, name: str, deviation: float, seed: int, into: Tensor, start: int
) -> None:
    """Fill ``into`` with the elements of this rank's flat share from ``start`` on."""
    (height, width), stop = parameters[name].tensor.shape, start + len(into)
    into.zero_()  # padding
    for part in parameters.parts(name):
        assert not isinstance(part.how, Replica)
        (block,), stream = part.how.blocks, generator(seed, part.name)
        held = Span(0, height, 0)  # rows of the whole
        whole, first = (height, block.size), 0
        if part.how.dim == 0:
            held = span(block, parameters.degree, parameters.rank)
            whole, first = (block.size, width), part.start
        if (first + held.length) * width <= start:
            continue
        for top, bottom in row_chunks(*whole):
            at = (max(top, held.start) - held.start + first) * width
            if top >= held.stop or at >= stop:
                break
            rows = torch.empty(bottom - top, whole[1]).normal_(0.0, deviation, generator=stream)
            if part.how.dim == 0:
                rows = rows[max(held.start - top, 0) : held.stop - top]
            else:
                rows = cut(rows, part.how, parameters.degree, parameters.rank)
            low, high = max(at, start), min(at + rows.numel(), stop)
            if low < high:
                into[low - start : high - start].copy_(rows.reshape(-1)[low - at : high - at])


def row_chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """The rows [top, bottom) of a matrix that are drawn together, of about ``AT_ONCE`` elements."""
    each = max(AT_ONCE // columns // BLOCK, 1) * BLOCK
    tops = [*range(0, rows, each)]
    if len(tops) > 1 and (rows - tops[-1]) * columns < BLOCK:
        tops.pop()
    yield from pairwise([*tops, rows])


def generator(seed: int, name: str) -> torch.Generator:
    """The stream of random numbers that a tensor of this name is drawn from."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
