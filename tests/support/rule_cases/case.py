"""The type of a table of cases."""

from __future__ import annotations

from typing import Any

# rule: (changes, world, problem) that trips it; then (changes, world) on the edge that keeps it
# (world: ranks, or ranks and those of a node)
Worlds = int | tuple[int, int] | None
Cases = dict[str, tuple[list[tuple[dict[str, Any], Worlds, str]], list[dict[str, Any]]]]
