"""A machine as the planner sees it: what a rank computes, holds and sends in a second.

``machines.toml`` names the known ones with their sources; a user's own TOML file has one table of
the same form.  ``cpu`` is this machine, measured when asked for: a matrix product and a copy.
"""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from llamax.config.load import nearest
from llamax.config.rules import either
from llamax.runtime.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

KNOWN = Path(__file__).with_name("hardware.toml")
THIS = "cpu"
GIB = 2**30
CGROUP_LIMITS = (  # of version 2, and of version 1
    "sys/fs/cgroup/memory.max",
    "sys/fs/cgroup/memory/memory.limit_in_bytes",
)
BACKENDS = ("cpu", "cuda", "xla", "neuron")
KINDS: dict[str, Any] = {"str": str, "bool": bool, "int": int}
WORDS = {
    "str": "a string",
    "bool": "true or false",
    "int": "a whole number of 0 or more",
    "float": "a number of 0 or more",
}


@dataclass(frozen=True)
class Machine:
    """One node; the units are in the names, the meanings at the top of ``machines.toml``."""

    name: str
    backend: str
    ranks: int
    memory_gib: float
    bfloat16_tflops: float
    float32_tflops: float
    memory_gbps: float
    link_gbps: float
    dollars_per_hour: float
    about: str = ""
    reserve_gib: float = 0.0
    bfloat16_products: bool = True
    link_latency_us: float = 0.0
    network_gbps: float = 0.0
    network_latency_us: float = 0.0
    matmul_efficiency: float = 1.0
    attention_efficiency: float = 1.0
    memory_efficiency: float = 1.0
    link_efficiency: float = 1.0
    network_efficiency: float = 1.0
    devices: int = 0
    efa: int = 0
    host_memory_gib: float = 0.0

    def peak_flops(self, dtype: str) -> float:
        """FLOP/s of a rank's dense matrix products in ``dtype``."""
        return 1e12 * (self.bfloat16_tflops if dtype == "bfloat16" else self.float32_tflops)

    def memory_bytes(self) -> float:
        """Bytes of device memory that a rank may fill."""
        return self.memory_gib * GIB

    def with_ranks(self, ranks: int) -> Machine:
        """The same node with ``ranks`` of its devices in use, or with its cores cut into so many.

        Raises ConfigError where there are fewer devices.
        """
        if self.backend != "cpu":
            if ranks > self.ranks:
                raise ConfigError(
                    f"--ranks={ranks} is more than the {self.ranks} devices of {self.name}; use "
                    f"{self.ranks} or fewer"
                )
            return replace(self, ranks=ranks)
        part = self.ranks / ranks
        return replace(
            self,
            ranks=ranks,
            memory_gib=self.memory_gib * part,
            bfloat16_tflops=self.bfloat16_tflops * part,
            float32_tflops=self.float32_tflops * part,
            memory_gbps=self.memory_gbps * part,
            link_gbps=self.link_gbps * part,
        )


def load_machine(name_or_path: str) -> Machine:
    """The machine of a name in ``machines.toml``, of a user's TOML file, or this one (``cpu``).

    Raises ConfigError where there is none, or a file does not describe one.
    """
    if name_or_path == THIS:
        return measure_machine()
    path = Path(name_or_path)
    if path.suffix == ".toml":
        return _one(path)
    machines = _read(KNOWN)
    also = {alias: name for name, table in machines.items() for alias in table.get("also", ())}
    name = also.get(name_or_path, name_or_path)
    if name not in machines:
        spellings = [THIS, *machines, *also]
        raise ConfigError(
            f"--instance {name_or_path} is neither a TOML file nor a machine that is known"
            f"{nearest(name_or_path, spellings)}"
        )
    return _machine(name, machines[name], KNOWN)


def known_machines() -> dict[str, Machine]:
    """The machines of ``machines.toml`` by name."""
    return {name: _machine(name, table, KNOWN) for name, table in _read(KNOWN).items()}


def machine_names() -> list[str]:
    """The machines that have a name."""
    return [THIS, *_read(KNOWN)]


def _one(path: Path) -> Machine:
    tables = _read(path)
    if len(tables) != 1:
        raise ConfigError(
            f"{path}: has {len(tables)} tables; a machine is one, such as [my-node] with ranks = 8"
        )
    ((name, table),) = tables.items()
    return _machine(name, table, path)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        tables: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from None
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {name} stands outside a table; begin with [my-node]")
    return tables


def _machine(name: str, table: dict[str, Any], path: Path) -> Machine:
    allowed = {each.name: each for each in fields(Machine) if each.name != "name"}
    values = {key: value for key, value in table.items() if key != "also"}
    for key, value in values.items():
        if key not in allowed:
            raise ConfigError(f"{path}: {name}.{key} is an unknown key{nearest(key, allowed)}")
        wanted = str(allowed[key].type)
        kind = KINDS.get(wanted, (int, float))
        right = isinstance(value, kind) and isinstance(value, bool) == (wanted == "bool")
        if not right or (not isinstance(value, str) and not 0 <= value < math.inf):
            raise ConfigError(f"{path}: {name}.{key}={value!r} is not {WORDS[wanted]}")
        if key.endswith("_efficiency") and not 0 < value <= 1:
            raise ConfigError(f"{path}: {name}.{key}={value!r} is no share; use above 0, 1 at most")
    if (backend := values.get("backend")) is not None and backend not in BACKENDS:
        raise ConfigError(f"{path}: {name}.backend={backend!r} is unknown; use {either(BACKENDS)}")
    for key, each in allowed.items():
        if each.default is MISSING and not values.get(key):
            if key in values and (
                key == "dollars_per_hour" or (key == "link_gbps" and values["ranks"] == 1)
            ):
                continue  # a node of one rank has no links, and one's own costs nothing
            raise ConfigError(f"{path}: {name}.{key} is missing or 0; write what one rank has")
    return Machine(name, **values)


def memory_share(whole: int, root: Path = Path("/")) -> int:
    """Bytes that this control group may hold of a machine with ``whole``."""
    for limit in CGROUP_LIMITS:
        try:
            whole = min(whole, int((root / limit).read_text()))
        except (OSError, ValueError):  # no control group of that version, or "max"
            continue
    return whole


def measure_machine(root: Path = Path("/")) -> Machine:
    """This machine: a product of 1024 x 1024 float32 matrices, a copy of 64 MB, its memory.

    One rank has all cores.  Links are memory: a message is copied three times on its way.
    """
    import numpy as np

    a, b = np.ones((2, 1024, 1024), np.float32)
    out = np.empty_like(a)
    source = np.ones(2**24, np.float32)
    copy = np.empty_like(source)
    product = min(_seconds(lambda: np.matmul(a, b, out=out)) for _ in range(6))
    copied = min(_seconds(lambda: np.copyto(copy, source)) for _ in range(4))
    tflops, gbps = 2 * 1024**3 / product / 1e12, 2 * source.nbytes / copied / 1e9
    memory = memory_share(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), root)
    return Machine(
        name=THIS,
        backend="cpu",
        bfloat16_products=_multiplies_bfloat16(),
        about="this machine, measured now",
        ranks=1,
        memory_gib=memory / GIB,
        reserve_gib=0.3,  # Python and torch
        bfloat16_tflops=tflops,
        float32_tflops=tflops,
        memory_gbps=gbps,
        link_gbps=gbps / 6,
        link_latency_us=100.0,
        dollars_per_hour=0.0,
        matmul_efficiency=0.90,
        attention_efficiency=0.50,
        memory_efficiency=0.70,
    )


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has units for bf16 products; without, llamax multiplies in float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in flags for flag in (" avx512_bf16", " amx_bf16", " bf16"))


def _seconds(function: Any) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
