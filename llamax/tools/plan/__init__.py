"""What a run will need and how long it will take, by arithmetic alone: no torch, no process group.

::

    Config + Machine + nodes ── share ──> what one rank holds of every matrix
                                ├─ memory ──> bytes by purpose, against the device's memory
                                └─ roofline ─> seconds by purpose, tokens/s, MFU
                                search ──> all meshes, best first, and why the others do not do

Every quantity is a ``Line``: a number, and the formula and figures it comes from.
"""

from __future__ import annotations

from dataclasses import dataclass

from llamax.config.schema import Config
from llamax.config.validate import accumulation
from llamax.parallel.mesh import Mesh
from llamax.runtime.units import show_number


@dataclass(frozen=True)
class Line:
    """One quantity of a plan, in bytes or seconds, and the formula that gives it."""

    name: str
    value: float
    formula: str


def headline(config: Config, mesh: Mesh, machines: str) -> str:
    """What runs where, in a line; ``machines``: how many of which."""
    data = config.data
    return (
        f"{show_number(config.model.num_parameters())} parameters in {config.run.dtype} on "
        f"{machines}: tensor {mesh.tp} x data {mesh.dp}, "
        f"{accumulation(config, mesh.dp)} microsteps of {data.micro_batch} x "
        f"{data.sequence_length} tokens, recompute {config.run.recompute}"
    )
