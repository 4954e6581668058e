"""The plan of one configuration on one kind of machine."""

from __future__ import annotations

from dataclasses import dataclass

from llamax.config.hardware import Machine
from llamax.config.schema import Config
from llamax.parallel.mesh import Mesh
from llamax.tools.plan.memory import Memory, memory
from llamax.tools.plan.roofline import Time, time
from llamax.tools.plan.sizes import Share


@dataclass(frozen=True)
class Plan:
    """Memory and time of a configuration on ``nodes`` machines."""

    config: Config
    mesh: Mesh
    machine: Machine
    nodes: int
    memory: Memory
    time: Time


def plan(config: Config, machine: Machine, nodes: int) -> Plan:
    """The plan of ``config``, which must be valid for a world of ``nodes`` x ``machine.ranks``."""
    mesh = Mesh.fill(nodes * machine.ranks, tp=config.parallel.tensor)
    share = Share(config, mesh)
    return Plan(config, mesh, machine, nodes, memory(share, machine), time(share, machine, nodes))
