"""Every layout of a run on its machines: those that fit, fastest first, and why others do not.

Tried are all tensor degrees that divide the world, context degrees of powers of two that leave
chunks of ``SHORTEST_CHUNK`` tokens or more, all recompute modes and micro-batches of powers of two;
parallel.data is the rest of the world.  Every other setting stays as configured.  Tensor and
context ranks share a node, on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

from llamax.config.constants import FLASH_MULTIPLE
from llamax.config.hardware import Machine
from llamax.config.rules import divisors
from llamax.config.schema import Config
from llamax.config.validate import problems
from llamax.tools.plan.length import Length, length_of
from llamax.tools.plan.memory import Recompute
from llamax.tools.plan.planner import Plan, plan_length

SHORTEST_CHUNK = FLASH_MULTIPLE  # tokens; shorter chunks are faster on more data ranks


@dataclass(frozen=True)
class Refused:
    """An invalid configuration, and the first reason."""

    config: Config
    reason: str


def candidates(config: Config, world: int) -> Iterator[Config]:
    """Every configuration that ``search`` tries in a world of ``world`` ranks."""
    batches = [2**k for k in range(6) if 2**k <= config.data.global_batch]
    for tensor in divisors(world):
        for context in contexts(config, world // tensor):
            parallel = replace(config.parallel, tensor=tensor, context=context, data=0)
            for micro_batch in batches:
                data = replace(config.data, micro_batch=micro_batch)
                for mode in get_args(Recompute):
                    run = replace(config.run, recompute=mode)
                    yield replace(config, parallel=parallel, data=data, run=run)


def contexts(config: Config, ranks: int) -> list[int]:
    """The context degrees tried on ``ranks`` ranks; the configured one always."""
    longest = min(ranks, config.data.sequence_length // (2 * SHORTEST_CHUNK))
    tried = {1, config.parallel.context, *(2**k for k in range(1, longest.bit_length()))}
    return sorted(degree for degree in tried if degree <= max(longest, config.parallel.context))


def search(
    config: Config, machine: Machine, nodes: int, length: Length | None = None
) -> tuple[list[Plan], list[Refused]]:
    """The plans of all valid candidates, fitting ones first and fastest first; and the refused.

    All have the same ``length``, by default that of ``config``.
    """
    world = nodes * machine.ranks
    length = length or length_of(config)
    plans, refused = [], []
    for candidate in candidates(replace(config, run=length.config.run), world):
        if reasons := problems(candidate, world, (), machine.ranks):
            refused.append(Refused(candidate, reasons[0]))
        else:
            plans.append(plan_length(replace(length, config=candidate), machine, nodes))
    plans.sort(key=lambda each: (not each.memory.fits, -each.time.tokens_per_s))
    return plans, refused
