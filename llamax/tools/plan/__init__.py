"""Memory, time and cost of a run by arithmetic alone: no torch, no process group.

::

    ResolvedRun + Machine   ── sizes ────> elements of every matrix on one rank
                                ├─ state, memory ──> bytes by purpose, against the device's memory
                                └─ roofline ─> seconds by purpose, tokens/s, MFU
                                search ──> every layout: those that fit, best first, and why the
                                           others are refused
                                nearest ─> the layout with the fewest changes that fits

Every quantity is a ``Line``: a number and its formula.
"""

from llamax.tools.plan.length import GivenLength, length_of
from llamax.tools.plan.nearest import Nearest, nearest
from llamax.tools.plan.planner import Plan, place, plan, plan_length, plan_run
from llamax.tools.plan.search import Refused, search

__all__ = [
    "GivenLength",
    "Nearest",
    "Plan",
    "Refused",
    "length_of",
    "nearest",
    "place",
    "plan",
    "plan_length",
    "plan_run",
    "search",
]
