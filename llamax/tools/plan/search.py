"""All ways to lay a run on its machines: those that fit, fastest first, and why others do not.

What is tried: every tensor degree that divides the world, each recompute mode, micro-batches of
powers of two; parallel.data is what the world leaves.  Everything else stays as configured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

from llamax.config.hardware import Machine
from llamax.config.rules import divisors
from llamax.config.schema import Config
from llamax.config.validate import problems
from llamax.parallel.mesh import Mesh
from llamax.tools.plan.memory import Memory, Recompute, memory
from llamax.tools.plan.roofline import Time, time
from llamax.tools.plan.sizes import Share


@dataclass(frozen=True)
class Plan:
    """A configuration on ``nodes`` machines: what it holds and how long it takes."""

    config: Config
    mesh: Mesh
    machine: Machine
    nodes: int
    memory: Memory
    time: Time


@dataclass(frozen=True)
class Refused:
    """A configuration that the rules refuse, and the first reason."""

    config: Config
    reason: str


def plan(config: Config, machine: Machine, nodes: int) -> Plan:
    """The plan of a configuration whose rules hold in that world."""
    mesh = Mesh.fill(nodes * machine.ranks, tp=config.parallel.tensor)
    share = Share(config, mesh)
    found = memory(share, machine)
    return Plan(config, mesh, machine, nodes, found, time(share, machine, nodes))


def candidates(config: Config, world: int) -> Iterator[Config]:
    """Every configuration that ``search`` tries."""
    batches = [2**k for k in range(6) if 2**k <= config.data.global_batch]
    for tensor in divisors(world):
        parallel = replace(config.parallel, tensor=tensor, data=0)
        for micro_batch in batches:
            data = replace(config.data, micro_batch=micro_batch)
            for mode in get_args(Recompute):
                run = replace(config.run, recompute=mode)
                yield replace(config, parallel=parallel, data=data, run=run)


def search(config: Config, machine: Machine, nodes: int) -> tuple[list[Plan], list[Refused]]:
    """Plans of all candidates, those that fit first and fastest first; and those refused."""
    plans, refused = [], []
    for candidate in candidates(config, nodes * machine.ranks):
        found = problems(candidate, nodes * machine.ranks)
        if found:
            refused.append(Refused(candidate, found[0]))
        else:
            plans.append(plan(candidate, machine, nodes))
    plans.sort(key=lambda each: (not each.memory.fits, -each.time.tokens_per_s))
    return plans, refused
