"""The global gradient norm, and the factor that clips it (Pascanu et al. 2013, sec. 3.2).

Squares are summed in rows of 4096 and the rows then added: one float32 accumulator over tens of
millions of squares, as a plain ``vector_norm`` or ``dot`` has on a CPU, loses the third digit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROW = 4096


def sum_of_squares(vectors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of float32 vectors: [n], [m], ... -> [], to about 1e-7."""
    return torch.stack([_sum_of_squares(x) for x in vectors]).sum()


def _sum_of_squares(x: Tensor) -> Tensor:
    whole = x.numel() // ROW * ROW
    found = []  # no empty slices: in a program they would be arrays without elements
    if whole:
        rows: Tensor = torch.linalg.vector_norm(x[:whole].view(-1, ROW), dim=1)
        found.append(rows.square().sum())
    if whole < x.numel() or not whole:
        found.append(x[whole:].square().sum())
    return sum(found[1:], found[0])


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """The factor, at most 1, that limits a norm to ``max_norm``; 1 if ``max_norm`` is 0."""
    if not max_norm:
        return torch.ones_like(norm)
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def is_finite(x: Tensor) -> Tensor:
    """Whether each element is neither infinite nor NaN, in operations that every device has."""
    return (x - x) == torch.zeros_like(x)
