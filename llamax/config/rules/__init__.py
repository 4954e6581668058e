"""Rules between fields, one module per part of a run; ``llamax.config.validate`` applies them.

A rule is a function that yields one line per problem.  It is registered with the keys it reads, so
that it is skipped where one of them holds no usable value: each mistake is reported once, and no
rule divides by zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from llamax.config.schema import Config


class World(NamedTuple):
    """The ranks of a run; None where a number is not known yet.

    ``node_ranks``: the ranks of a node, given where a group of ranks must not span nodes.
    """

    ranks: int | None = None
    node_ranks: int | None = None


Rule = Callable[[Config, World], Iterator[str]]


class Rules(list[tuple[tuple[str, ...], Rule]]):
    """The rules of one module, each with the keys that it reads."""

    def reading(self, *keys: str) -> Callable[[Rule], Rule]:
        """Register the decorated function as a rule that reads ``keys``."""

        def register(function: Rule) -> Rule:
            self.append((keys, function))
            return function

        return register


LARGEST_FACTOR = 10**5  # looked for; a value in a file may have any size


def divisors(n: int) -> list[int]:
    """The divisors of ``n`` in ascending order, those of very large ones in part."""
    low = [d for d in range(1, min(math.isqrt(n), LARGEST_FACTOR) + 1) if n % d == 0]
    return low + [n // d for d in reversed(low) if d * d < n]


def multiples_near(n: int, step: int) -> list[int]:
    """The multiples of ``step`` on both sides of ``n``, without 0."""
    below = n - n % step
    return [m for m in (below, below + step) if m]
