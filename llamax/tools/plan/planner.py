"""The plan of one run on one kind of machine."""

from __future__ import annotations

from dataclasses import dataclass

from llamax.config.hardware import Machine
from llamax.config.schema import Config
from llamax.tools.plan.memory import Memory, memory
from llamax.tools.plan.roofline import Time, time
from llamax.tools.plan.sizes import Share
from llamax.training.resolve import ResolvedRun, resolve, visible_samples


@dataclass(frozen=True)
class Plan:
    """Memory and time of a run on ``nodes`` machines."""

    run: ResolvedRun
    machine: Machine
    nodes: int
    memory: Memory
    time: Time


def plan(config: Config, machine: Machine, nodes: int) -> Plan:
    """The plan of ``config`` on ``nodes`` machines, with the data set if it is there.

    Raises ConfigError if the configuration is not valid for a world of ``nodes`` x
    ``machine.ranks`` ranks.
    """
    run = resolve(config, nodes * machine.ranks, *visible_samples(config))
    return plan_run(run, machine, nodes)


def plan_run(run: ResolvedRun, machine: Machine, nodes: int) -> Plan:
    """The plan of a run on ``nodes`` machines."""
    share = Share(run)
    return Plan(run, machine, nodes, memory(share, machine), time(share, machine, nodes))
