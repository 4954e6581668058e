"""Keys that docs/reference/json.md lists for what a command prints with --json."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/reference/json.md"


def documented(command: str) -> set[str]:
    """The keys in the table of the section on ``command``."""
    sections = PAGE.read_text().split("\n## ")
    (section,) = (each for each in sections if each.startswith(f"{command} --json\n"))
    rows = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    return {key for row in rows for key in re.findall(r"`(\w+)`", row)}
