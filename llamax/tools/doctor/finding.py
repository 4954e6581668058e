"""A finding, and the host that it is about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llamax.runtime.versions import installed

AMAZON = "0x1d0f"  # as PCI numbers it
Level = Literal["ok", "unseen", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """``what`` was found; unless it is fine, ``why`` it matters and the command to ``mend`` it.

    ``unseen``: what cannot be looked at from here, and where it can.
    """

    level: Level
    name: str
    what: str
    why: str = ""
    mend: str = ""


def ok(name: str, what: str) -> Finding:
    return Finding("ok", name, what)


def unseen(name: str, what: str, where: str) -> Finding:
    return Finding("unseen", name, what, mend=where)


@dataclass(frozen=True)
class Host:
    """A machine: its files below ``root``, its environment, and what Python has installed."""

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=dict)
    packages: Mapping[str, str] | None = None  # None: what is installed here

    @property
    def neuron_devices(self) -> int:
        return len(self.find("dev", "neuron[0-9]*"))

    @property
    def gpus(self) -> int:
        return len(self.find("dev", "nvidia[0-9]*"))

    @property
    def efa_adapters(self) -> int:
        """Amazon's among the adapters for RDMA, by the number of the maker on the PCI bus."""
        makers = self.find("sys/class/infiniband", "*/device/vendor")
        return sum(path.read_text().strip() == AMAZON for path in makers)

    def version(self, package: str) -> str | None:
        return installed(package) if self.packages is None else self.packages.get(package)

    def read(self, path: str) -> str | None:
        """A small file's text; None where it cannot be read."""
        try:
            return (self.root / path).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None

    def find(self, folder: str, pattern: str) -> list[Path]:
        return sorted((self.root / folder).glob(pattern))
