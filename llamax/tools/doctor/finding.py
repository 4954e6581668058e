"""A finding of a check, and the host that is checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llamax.runtime.versions import installed

AMAZON = "0x1d0f"  # vendor number on the PCI bus
Level = Literal["ok", "unknown", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """The result of one check: ``what`` was found, ``why`` it matters, and how to ``fix`` it.

    Level ``unknown``: this cannot be checked on this machine; ``fix`` says where it can.
    """

    level: Level
    name: str
    what: str
    why: str = ""
    fix: str = ""


def passed(name: str, what: str) -> Finding:
    """The finding of a check that passed."""
    return Finding("ok", name, what)


def unknown(name: str, what: str, where: str) -> Finding:
    """The finding of a check that is only possible ``where`` it says."""
    return Finding("unknown", name, what, fix=where)


@dataclass(frozen=True)
class Host:
    """A machine: its files below ``root``, its environment, and its installed packages."""

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=dict)
    packages: Mapping[str, str] | None = None  # versions by name; None: of this Python

    @property
    def neuron_devices(self) -> int:
        """Trainium chips."""
        return len(self.find("dev", "neuron[0-9]*"))

    @property
    def gpus(self) -> int:
        """NVIDIA GPUs."""
        return len(self.find("dev", "nvidia[0-9]*"))

    @property
    def efa_adapters(self) -> int:
        """The RDMA adapters made by Amazon."""
        vendors = self.find("sys/class/infiniband", "*/device/vendor")
        return sum(path.read_text().strip() == AMAZON for path in vendors)

    def version(self, package: str) -> str | None:
        """The version of an installed package; None where it is not installed."""
        return installed(package) if self.packages is None else self.packages.get(package)

    def read(self, path: str) -> str | None:
        """The text of a small file; None where it cannot be read."""
        try:
            return (self.root / path).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None

    def find(self, folder: str, pattern: str) -> list[Path]:
        """The files in a folder that match a pattern, sorted."""
        return sorted((self.root / folder).glob(pattern))
