"""A pseudo-random order that is computed, not stored.

A balanced Feistel network (Luby and Rackoff, 1988) over the next power of four, walked along its
cycle until it falls below n (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA
2002, section 3); rounds mix as splitmix64 does (Steele, Lea, Flood, 2014).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

ROUNDS = 8
Integers = npt.NDArray[np.int64]


def permute(places: Integers, n: int, seed: int, epoch: int) -> Integers:
    """Where ``places`` of 0..n-1 go under the permutation of (seed, epoch)."""
    seeds, epochs = (np.array([number], np.uint64) for number in (seed, epoch))
    return permute_each(places, np.array([n]), seeds, epochs)


def permute_each(
    places: Integers, n: Integers, seed: npt.NDArray[Any], epoch: npt.NDArray[Any]
) -> Integers:
    """Where places [k] go, each under a permutation of its own; the others are [k] or [1]."""
    _, bits = np.frexp(np.maximum(n - 1, 1).astype(np.float64))
    half = np.maximum(1, (bits + 1) // 2).astype(np.uint64)
    keys = _mix(
        _mix(seed.astype(np.uint64) + np.zeros((ROUNDS, 1), np.uint64)) + epoch.astype(np.uint64)
    )
    keys = _mix(keys + np.arange(ROUNDS, dtype=np.uint64)[:, None])
    values = places.astype(np.uint64)
    todo = np.arange(len(values))
    while len(todo):
        values[todo] = _feistel(values[todo], _at(half, todo), _at(keys, todo))
        todo = todo[values[todo] >= _at(n, todo)]
    return values.astype(np.int64)


def _at(numbers: npt.NDArray[Any], places: Integers) -> npt.NDArray[Any]:
    """Those of the places, unless one number is for all."""
    return numbers if numbers.shape[-1] == 1 else numbers[..., places]


def _feistel(
    x: npt.NDArray[np.uint64], half: npt.NDArray[np.uint64], keys: npt.NDArray[Any]
) -> npt.NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    joined: npt.NDArray[np.uint64] = left << half | right
    return joined


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64: every bit of the input moves every bit of the output."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ x >> np.uint64(31)
    return mixed
