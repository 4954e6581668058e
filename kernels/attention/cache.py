"""Writes the keys or values of one new token of each sequence into their cache, in place.

::

    places  -> write            rows of the flat cache              index_copy_
    compared_places -> compared_write   a mask of the cache         where, for XLA

A compiler fuses the comparison with its neighbours; a scatter, and an index that differs between
sequences, it would not.  The mask reads and writes the whole cache, which attention reads anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor


def places(positions: Tensor, cache: Tensor) -> Tensor:
    """Rows of the flat cache: [B, 1], [B, K, T, E] -> [B * K]."""
    B, K, T, _ = cache.shape
    starts = torch.arange(0, B * K * T, T, device=cache.device).view(B, K)
    return (starts + positions).flatten()


def write(cache: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """Write ``new`` [B, K, E] at the ``rows`` of a contiguous cache [B, K, T, E]."""
    flat = cache.view(-1, cache.shape[-1])
    return flat.index_copy_(0, rows, new.reshape(-1, cache.shape[-1]))


def compared_places(positions: Tensor, cache: Tensor) -> Tensor:
    """Whether a place of the cache is that of the new token: -> bool [B, 1, T, 1]."""
    place = torch.arange(cache.shape[2], dtype=positions.dtype, device=cache.device)
    return (positions == place)[:, None, :, None]


def compared_write(cache: Tensor, chosen: Tensor, new: Tensor) -> Tensor:
    """Write ``new`` [B, K, E] where ``chosen`` is true."""
    return cache.copy_(torch.where(chosen, new[:, :, None], cache))
