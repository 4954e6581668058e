"""Prints the requirements that a container image lacks, pinned with hashes, for pip.

``requirements-image.txt`` is exported from ``uv.lock``.  A package of the base image stays as it is
when ``pyproject.toml`` allows its version: torch, and what is built for its devices, must fit each
other.  So only what is missing or too old is installed, and that at the pinned version::

    python3 launch/image_pins.py              what llamax needs and the image lacks
    python3 launch/image_pins.py setuptools   the named packages alone

Standard library only: it runs in the image before anything is installed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
BUILD = ("setuptools",)  # needed to install llamax, and installed into a folder of its own
REQUIREMENT = re.compile(r"^\s*\"([\w.-]+)(?:\[[\w,-]+\])?>=([\w.]+)", re.MULTILINE)


def pins(text: str) -> Iterator[tuple[str, str]]:
    """(name, requirement with its hashes) of each entry of a requirement file."""
    for entry in re.split(r"\n(?=[A-Za-z0-9])", text):
        if found := re.match(r"([A-Za-z0-9][\w.-]*)==", entry):
            yield normal(found[1]), entry.rstrip()


def needed(requirements: str, project: str, versions: dict[str, str]) -> list[str]:
    """The entries of ``requirements`` that an image with the packages ``versions`` lacks.

    ``project`` is the text of ``pyproject.toml``, which has the oldest version of each package.
    """
    oldest = {normal(name): version for name, version in REQUIREMENT.findall(project)}
    return [
        entry
        for name, entry in pins(requirements)
        if name not in BUILD
        and (name not in versions or numbers(versions[name]) < numbers(oldest.get(name, "0")))
    ]


def normal(name: str) -> str:
    """The name of a package as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def numbers(version: str) -> list[int]:
    """The leading numbers of a version, without zeros at the end."""
    found = re.match(r"\d+(\.\d+)*", version)
    parts = [int(part) for part in found[0].split(".")] if found else [0]
    while parts and parts[-1] == 0:
        parts.pop()
    return parts


def main(names: Sequence[str]) -> int:
    """Print the entries of ``names``, or of all that is needed here."""
    requirements = (REPOSITORY / "requirements-image.txt").read_text()
    if names:
        lines = [entry for name, entry in pins(requirements) if name in names]
    else:
        here = {normal(found.metadata["Name"]): found.version for found in metadata.distributions()}
        project = (REPOSITORY / "pyproject.toml").read_text()
        lines = needed(requirements, project, here)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
