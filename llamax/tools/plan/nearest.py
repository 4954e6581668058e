"""The nearest layout that fits, where the one as configured does not.

On the same nodes it is the layout with the fewest changed settings, and the fastest of those; one
whose programs are large for the compiler is taken only where all are.
Where none fits there, the smallest larger number of nodes on which one fits is taken, else the
largest smaller number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from llamax.config.hardware import Machine
from llamax.config.rules import divisors
from llamax.config.schema import Config
from llamax.config.toml import to_toml
from llamax.config.types import ZeroStage
from llamax.tools.plan.length import Length, length_of
from llamax.tools.plan.planner import Plan, plan_run
from llamax.tools.plan.search import (
    contexts,
    divisions,
    pipelines,
    refusals,
    search,
    traced,
    uneven,
    ways,
    zeros,
)
from llamax.training.resolve import resolve

SAVERS = ("parallel.sequence", "finetune.shard_base")  # on, they save memory
CHANGED = (
    "parallel.tensor",
    "parallel.context",
    "parallel.context_by",
    "parallel.pipeline",
    "parallel.chunks",
    "parallel.layers_per_stage",
    "data.micro_batch",
    "run.recompute",
    "parallel.zero",
    "parallel.zero_ranks",
    *SAVERS,
)


@dataclass(frozen=True)
class Nearest:
    """A layout, and the options that lead to it.

    Where no layout fits on any number of nodes, it is the one that needs the least memory.
    """

    plan: Plan
    flags: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.plan.memory.fits


def nearest(
    config: Config, machine: Machine, nodes: int, length: Length | None = None
) -> Nearest | None:
    """The nearest layout of ``config`` that fits, else the smallest; None if none is valid.

    It is priced at ``length``, by default that of ``config``.
    """
    length = length or length_of(config)
    smallest: Plan | None = None
    for number in node_counts(config, machine, nodes):
        found: list[Nearest] = []
        for variant in savers_on(config):
            plans = [*small_layouts(variant, machine, number)]
            if any(plan.memory.fits for plan in plans):
                found += [
                    Nearest(plan, flags(config, nodes, plan))
                    for plan in search(variant, machine, number, length, stages(config, machine))[0]
                    if plan.memory.fits
                ]
            for plan in plans:
                if smallest is None or plan.memory.peak < smallest.memory.peak:
                    smallest = plan
        if found:
            return min(found, key=_changes)
    return Nearest(smallest, flags(config, nodes, smallest)) if smallest else None


def _changes(near: Nearest) -> tuple[bool, int, float]:
    return near.plan.large, len(near.flags), -near.plan.time.tokens_per_s


def stages(config: Config, machine: Machine) -> list[ZeroStage]:
    """The ZeRO stages that a layout may have: on XLA 2 and 3 only where they are configured.

    There the mesh is changed instead.
    """
    own = config.parallel.zero
    return [zero for zero in zeros(config) if zero in (own, 1) or not traced(config, machine)]


def node_counts(config: Config, machine: Machine, nodes: int) -> list[int]:
    """The numbers of machines that can share a global batch, in the order in which they are tried.

    First ``nodes``, then the larger ones, then the smaller ones, from near to far.  Pipelines of
    unequal stages are tried on ``nodes`` alone.
    """
    worlds = {
        group * data * pipeline
        for group in divisors(machine.ranks)
        for data in divisors(config.data.global_batch)
        for pipeline in pipelines(config)
    }
    counts = {world // machine.ranks for world in worlds if world % machine.ranks == 0}
    here = nodes * machine.ranks
    if any(
        config.data.global_batch % (here // (group * len(stages))) == 0
        for group in divisors(machine.ranks)
        for stages in uneven(config, here // group)
    ):
        counts.add(nodes)
    return sorted(counts, key=lambda number: (number < nodes, abs(number - nodes)))


def savers_on(config: Config) -> Iterator[Config]:
    """The configuration, and with each set of settings on that save memory and are off."""
    off = [key for key in SAVERS if not _value(config, key)]
    for size in range(len(off) + 1):
        for keys in itertools.combinations(off, size):
            variant = config
            for key in keys:
                section, _, name = key.partition(".")
                on = type(_value(config, key))(1)
                changed = replace(getattr(variant, section), **{name: on})
                variant = replace(variant, **{section: changed})
            yield variant


def small_layouts(config: Config, machine: Machine, nodes: int) -> Iterator[Plan]:
    """The plan of every mesh with the least activations: one of them fits, or no layout does."""
    world = nodes * machine.ranks
    small = replace(
        config,
        data=replace(config.data, micro_batch=1),
        run=replace(config.run, recompute="full"),
    )
    for tensor in divisors(machine.ranks):
        for context in contexts(config, machine.ranks // tensor):
            tried = divisions(config, machine, nodes, tensor, context, stages(config, machine))
            for parallel in tried:
                layout = replace(small, parallel=parallel)
                if not refusals(layout, machine, nodes):
                    for way in ways(layout):
                        yield plan_run(resolve(way, world), machine, nodes)


def flags(config: Config, nodes: int, plan: Plan) -> tuple[str, ...]:
    """The options that turn ``config`` on ``nodes`` machines into ``plan``, to be pasted."""
    there, data = plan.run.config, config.parallel.data
    changes = [f"--nodes={plan.nodes}"] if plan.nodes != nodes else []
    changes += [
        f"--{key}={text if isinstance(text := _value(there, key), str) else to_toml(text)}"
        for key in CHANGED
        if _value(there, key) != _value(config, key)
    ]
    changes += ["--parallel.data=0"] if data not in (0, plan.run.mesh.dp) else []
    return tuple(changes)


def _value(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)
