"""Dropout without random state: a feature is dropped by a hash of its step, sample and place.

No random state exists, so nothing needs to be saved, restored or kept equal between ranks::

    key of a sample     hash(seed, step, number in the global batch)        on the host, an input
    key of a token      mix(key of its sample + mix(place in the sequence))
    key of a feature    mix(number of the module + number of the feature)   counted in the whole
    dropped             mix(token + feature) below p, of all 32-bit numbers

A sample meets the same mask on every mesh, with any micro-batch, when a block is recomputed, and
after a resume; a rank computes its own columns of a mask alone.  The rank enters through the
axis's ``rank_index``, so that every rank traces the same graph.  All arithmetic wraps at 32 bits.

``mix`` alternates shifts and multiplications, as the finalizer of MurmurHash3 does (Appleby 2011),
with the constants of C. Wellons' "Prospecting for Hash Functions" (2018).
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST, SECOND = 0x7FEB352D, 0x846CA68B
GOLDEN = 0x9E3779B97F4A7C15
MASK31, MASK64 = 2**31 - 1, 2**64 - 1


class Dropout:
    """Zeroes a share ``p`` of features and scales the others up to keep the mean.

    ``begin`` names the samples of the next forward pass; before it, and after it is given None,
    nothing is dropped.
    """

    def __init__(self, p: float, seed: int = 0) -> None:
        self.p, self.seed = p, seed
        self.tokens_BS: Tensor | None = None

    def keys(self, step: int, first: int, count: int) -> Tensor | None:
        """Keys of ``count`` samples from the ``first`` of a step's global batch on: int32 [B]."""
        if not self.p:
            return None
        samples = range(first, first + count)
        keys = [_fold(_fold(_fold(self.seed) + step) + number) for number in samples]
        return torch.tensor([signed(key >> 32) for key in keys], dtype=torch.int32)

    def begin(self, keys_B: Tensor | None, length: int, places_S: Tensor | None = None) -> None:
        """Samples with these keys follow, of ``length`` tokens: int32 [B].

        ``places_S`` (int32) are the places of the tokens in their sequences, by default 0, 1, ...
        """
        self.tokens_BS = None
        if keys_B is not None:
            if places_S is None:
                places_S = torch.arange(length, dtype=torch.int32, device=keys_B.device)
            self.tokens_BS = mix(keys_B.unsqueeze(1) + mix(places_S))

    def __call__(self, x: Tensor, stays: Tensor | None) -> Tensor:
        """x, or its gradient, where it ``stays`` (None: everywhere), scaled: [B,S,F] twice."""
        if stays is None:
            return x
        return torch.where(stays, x * (1 / (1 - self.p)), x.new_zeros(()))


def feature_keys(module: int, count: int, start: Tensor) -> Tensor:
    """Keys of ``count`` features of a module from feature ``start`` (0-d) on: int32 [F]."""
    features_F = torch.arange(count, dtype=torch.int32, device=start.device)
    return mix(features_F + start.to(torch.int32) + signed(_fold(module) >> 32))


def kept(tokens_BS: Tensor, features_F: Tensor, p: float) -> Tensor:
    """Which features stay: int32 [B,S], [F] -> bool [B,S,F]."""
    return mix(tokens_BS.unsqueeze(-1) + features_F) >= round(p * 2**32) - 2**31


def mix(x: Tensor) -> Tensor:
    """An int32 that is different for each int32, and looks random: [...] -> [...].

    The sign is left out of shifts: torch-xla divides a negative number where torch shifts it.
    """
    x = (x ^ ((x & MASK31) >> 16)) * FIRST
    x = (x ^ ((x & MASK31) >> 15)) * signed(SECOND)
    return x ^ ((x & MASK31) >> 16)


def signed(x: int) -> int:
    """An unsigned 32-bit number as the int32 with its bits."""
    return (x & 0xFFFFFFFF) - ((x & 0x80000000) << 1)


def _fold(x: int) -> int:
    """splitmix64 of a Python integer (Steele, Lea, Flood 2014)."""
    x = (x + GOLDEN) & MASK64
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK64
    return x ^ x >> 31
