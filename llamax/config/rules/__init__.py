"""Rules between fields, one module per part of a run; ``llamax.config.validate`` applies them.

A rule is a function that yields one line per problem.  It is registered with the keys it reads, so
that it is skipped where one of them holds no usable value: each mistake is reported once, and no
rule divides by zero.

A line ends with values to use instead.  They go through ``use`` or ``fitting``, which leave out
what another rule would refuse.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from llamax.config.schema import Config
from llamax.config.types import out_of_range
from llamax.runtime.errors import join_or


class World(NamedTuple):
    """The ranks of a run; None where a number is not known yet.

    ``node_ranks``: the ranks of a node, given where a group of ranks must not span nodes.
    ``advises``: whether what a problem suggests has to hold; off, where only its first words count.
    """

    ranks: int | None = None
    node_ranks: int | None = None
    advises: bool = True


Rule = Callable[[Config, World], Iterator[str]]


EVERY: list[tuple[tuple[str, ...], Rule]] = []  # the rules of all modules


class Rules(list[tuple[tuple[str, ...], Rule]]):
    """The rules of one module, each with the keys that it reads."""

    def reading(self, *keys: str) -> Callable[[Rule], Rule]:
        """Register the decorated function as a rule that reads ``keys``."""

        def register(function: Rule) -> Rule:
            self.append((keys, function))
            EVERY.append((keys, function))
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


Changes = dict[str, Any]  # key, with its section: value


def fitting(
    c: Config, world: World, tried: Iterable[Changes], follow: bool = False
) -> list[Changes]:
    """The changes of ``c``, of those ``tried``, that may be suggested.

    They are the ones that no rule refuses which reads a changed key.  Where there are none, what is
    refused for another value will do: by rules that refuse ``c`` too, or with ``follow`` by any, as
    that value can be changed next.
    """
    tried = list(tried)
    if not world.advises:
        return tried
    silent = world._replace(advises=False)
    broken = {key for key, _ in out_of_range(c)}
    rules = [(keys, rule) for keys, rule in EVERY if broken.isdisjoint(keys)]

    def refusals(config: Config, changes: Changes) -> dict[Rule, str]:
        reading = [rule for keys, rule in rules if not changes.keys().isdisjoint(keys)]
        return {rule: line for rule in reading if (line := next(rule(config, silent), ""))}

    found = [(changes, refusals(changed(c, changes), changes)) for changes in tried]
    if fits := [changes for changes, lines in found if not lines]:
        return fits
    found = [(changes, lines) for changes, lines in found if not _blamed(changes, lines.values())]
    fits = [changes for changes, lines in found if lines.keys() <= refusals(c, changes).keys()]
    return fits or [changes for changes, _ in found if follow]


def _blamed(changes: Changes, lines: Iterable[str]) -> bool:
    """Whether a problem is one of a changed value."""
    words = {word for line in lines for word in re.split(r"[ ,;:]", line)}
    return any(f"{key}={value}" in words for key, value in changes.items())


def fitting_values(c: Config, world: World, key: str, values: Iterable[Any]) -> list[Any]:
    """The ``values`` of one key that may be suggested: see ``fitting``, with ``follow``."""
    found = fitting(c, world, ({key: value} for value in values), follow=True)
    return [each[key] for each in found]


def changed(c: Config, changes: Changes) -> Config:
    """``c`` with the value of each ``section.key`` replaced."""
    for key, value in changes.items():
        section, _, name = key.partition(".")
        part = replace(getattr(c, section), **{name: value})
        c = replace(c, **{section: part})
    return c


def ways(*found: str) -> str:
    """``; use A, or B``: what mends a problem, without those that are empty."""
    said = ", or ".join(filter(None, found))
    return f"; use {said}" if said else ""


def use(c: Config, world: World, key: str, values: Iterable[Any], named: bool = False) -> str:
    """``1, 2 or 4``: the values of ``key`` that may be suggested; '' if there are none.

    ``named``: with the key before them.
    """
    found = fitting_values(c, world, key, values)
    return f"{key}=" * named + join_or(found) if found else ""
