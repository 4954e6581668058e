"""A pseudo-random order that is computed, not stored.

A balanced Feistel network (Luby and Rackoff, 1988) over the next power of four, walked along its
cycle until it falls below n (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA
2002, section 3); rounds mix as splitmix64 does (Steele, Lea, Flood, 2014).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

ROUNDS = 8
SMALL = 2**12  # entries of a table that pays even for a few places
Integers = npt.NDArray[np.int64]


def permute(places: Integers, n: int, seed: int, epoch: int) -> Integers:
    """Where ``places`` of 0..n-1 go under the permutation of (seed, epoch)."""
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    if 2**half > max(len(places), SMALL):
        seeds, epochs = (np.array([number], np.uint64) for number in (seed, epoch))
        return permute_each(places, np.array([n]), seeds, epochs)
    tables, values = _tables(half, seed, epoch), places.astype(np.int64)
    todo = np.arange(len(values))
    while len(todo):
        left, right = values[todo] >> half, values[todo] & 2**half - 1
        for table in tables:
            left, right = right, left ^ table[right]
        values[todo] = left << half | right
        todo = todo[values[todo] >= n]
    return values


@lru_cache(maxsize=4)
def _tables(half: int, seed: int, epoch: int) -> Integers:
    """What each round mixes into the left half, for every right half of ``half`` bits."""
    keys = _keys(*(np.array([number], np.uint64) for number in (seed, epoch)))
    mixed = mix(np.arange(2**half, dtype=np.uint64) + keys)
    tables: Integers = (mixed & np.uint64(2**half - 1)).astype(np.int64)
    return tables


def permute_each(
    places: Integers, n: Integers, seed: npt.NDArray[Any], epoch: npt.NDArray[Any]
) -> Integers:
    """Where places [k] go, each under a permutation of its own; the others are [k] or [1]."""
    _, bits = np.frexp(np.maximum(n - 1, 1).astype(np.float64))
    half = np.maximum(1, (bits + 1) // 2).astype(np.uint64)
    keys = _keys(seed, epoch)
    values = places.astype(np.uint64)
    todo = np.arange(len(values))
    while len(todo):
        values[todo] = _feistel(values[todo], _at(half, todo), _at(keys, todo))
        todo = todo[values[todo] >= _at(n, todo)]
    return values.astype(np.int64)


def _keys(seed: npt.NDArray[Any], epoch: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """The keys of the rounds of each permutation: [ROUNDS, k]."""
    keys = mix(
        mix(seed.astype(np.uint64) + np.zeros((ROUNDS, 1), np.uint64)) + epoch.astype(np.uint64)
    )
    return mix(keys + np.arange(ROUNDS, dtype=np.uint64)[:, None])


def _at(numbers: npt.NDArray[Any], places: Integers) -> npt.NDArray[Any]:
    """Those of the places, unless one number is for all."""
    return numbers if numbers.shape[-1] == 1 else numbers[..., places]


def _feistel(
    x: npt.NDArray[np.uint64], half: npt.NDArray[np.uint64], keys: npt.NDArray[Any]
) -> npt.NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (mix(right + key) & mask)
    joined: npt.NDArray[np.uint64] = left << half | right
    return joined


def mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64: every bit of the input moves every bit of the output."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ x >> np.uint64(31)
    return mixed
