"""``environment.json`` in the folder of a run: its ranks, machine and versions.

For whoever reads the run later: the machine, its price, versions, the job's name at its launcher.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Any

from llamax.config.constants import ENVIRONMENT_FILE
from llamax.config.hardware import find_machine
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.files import write_atomic
from llamax.runtime.versions import LLAMAX, installed

PRODUCT = Path("/sys/devices/virtual/dmi/id/product_name")  # on EC2 the instance type
PACKAGES = ("torch", "torch-xla", "torch-neuronx", "neuronx-cc", "neuronx-distributed", "numpy")


def describe(where: Rendezvous, step: int = 0) -> dict[str, Any]:
    """All of it, ready for JSON; the price is that of the machine's instance type, if known.

    ``step``: the last step done when the run started.
    """
    nodes = -(-where.world_size // where.local_world_size)
    instance = _instance()
    return {
        "job": where.job,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "step": step,
        "host": socket.gethostname(),
        "nodes": nodes,
        "ranks": where.world_size,
        "instance": instance,
        "dollars_per_hour": nodes * _price(instance),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "llamax": LLAMAX,
        **dict(_versions()),
        "command": shlex.join(sys.argv),
    }


def write(folder: Path, where: Rendezvous, step: int = 0) -> None:
    """Leave it in a run's folder."""
    text = json.dumps(describe(where, step), indent=2)
    write_atomic(folder / ENVIRONMENT_FILE, f"{text}\n".encode())


def _versions() -> list[tuple[str, str]]:
    versions = [(package, installed(package)) for package in PACKAGES]
    return [(package, version) for package, version in versions if version is not None]


def _instance() -> str:
    try:
        return PRODUCT.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _price(instance: str) -> float:
    machine = find_machine(instance)
    return machine.dollars_per_hour if machine else 0.0
