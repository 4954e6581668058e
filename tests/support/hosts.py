"""Machines for the doctor: a folder with the files of /dev, /sys and /proc."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llamax.tools.doctor import Finding, Host

SDK = {
    "torch": "2.9.0+cpu",
    "torch-xla": "2.9.0",
    "torch-neuronx": "2.9.0.2.12.1",
    "neuronx-cc": "2.23.6484.0",
    "neuronx-distributed": "0.17.26814",
    "nki": "0.2.0",
}


def host_with(root: Path, **files: str) -> Host:
    """A machine with these files; ``__`` in a name is ``/``."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Host(root)


def trainium(root: Path, devices: int = 16, driver: str = "2.26.5.0") -> Host:
    names = {f"dev__neuron{n}": "" for n in range(devices)}
    return host_with(root, **names, sys__module__neuron__version=driver + "\n")


def levels(found: Iterable[Finding]) -> dict[str, str]:
    found = list(found)
    for each in found:
        assert each.what
        assert bool(each.why) == (each.level in ("warning", "error")), each
        assert bool(each.fix) == (each.level != "ok"), each
    return {each.name: each.level for each in found}
