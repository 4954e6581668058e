"""The table of machines: what a node computes, holds, sends and costs.

``hardware.toml`` lists the known machines with their sources; backends, planner, launcher, doctor
and run metadata read it here.  A user's TOML file describes one machine in the same form.  ``cpu``
is the machine at hand: loading it measures a matrix product and a copy.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from llamax.config.rules.parallel import node_limit
from llamax.config.schema import NEURON_BACKENDS, BackendName
from llamax.config.toml import Problems, build, read_toml
from llamax.config.types import Count, Efficiency, Natural, NonNegative, Positive
from llamax.runtime.errors import ConfigError, did_you_mean, join_or, refuse
from llamax.runtime.units import count

KNOWN = Path(__file__).with_name("hardware.toml")
THIS = "cpu"
UNSHARED = ("description", "also", "gpu_names", "like")  # what a machine does not take from another
GIB = 2**30
CGROUP_LIMITS = (  # of version 2, and of version 1
    "sys/fs/cgroup/memory.max",
    "sys/fs/cgroup/memory/memory.limit_in_bytes",
)


@dataclass(frozen=True)
class Machine:
    """One node; the quantities of computing, memory and links are those of one rank."""

    name: str
    """Name of the machine, on AWS its instance type."""
    backend: BackendName
    """Value of run.backend there."""
    ranks: Count
    """NeuronCores (logical ones on trn2), GPUs or processes of a node [ranks]."""
    memory_gib: Positive
    """Device memory of a rank [GiB]."""
    bfloat16_tflops: Positive
    """Dense matrix peak of a rank in bfloat16, as the vendor states it [TFLOP/s]."""
    float32_tflops: Positive
    """Dense matrix peak of a rank in float32, without TF32 [TFLOP/s]."""
    memory_gbps: Positive
    """Device memory bandwidth of a rank [1e9 bytes/s]."""
    link_gbps: NonNegative
    """What a rank sends to the others of its node, one way; 0: a node of one rank [1e9 bytes/s]."""
    dollars_per_hour: NonNegative
    """Price of a node on demand [$/h]."""
    description: str = ""
    """The machine in words, with the source of its figures."""
    also: tuple[str, ...] = ()
    """Other names of the machine."""
    gpu_names: tuple[str, ...] = ()
    """GPUs with these peaks, as torch.cuda.get_device_name calls them, without NVIDIA."""
    reserve_gib: NonNegative = 0.0
    """Device memory of a rank kept for the runtime, programs and fragments [GiB]."""
    bfloat16_products: bool = True
    """Multiplies in bfloat16; otherwise llamax multiplies in float32."""
    link_latency_us: NonNegative = 0.0
    """Time of one step of a ring in a node [us]."""
    network_gbps: NonNegative = 0.0
    """What a node sends to the network, one way [1e9 bytes/s]."""
    network_latency_us: NonNegative = 0.0
    """Time of one step of a ring between nodes [us]."""
    product_tile: Count = 1
    """Side of the square of weights that its matrix unit multiplies by at once [elements]."""
    matmul_efficiency: Efficiency = 1.0
    """Share of the peak that matrix products reach."""
    attention_efficiency: Efficiency = 1.0
    """Share of the peak that attention reaches."""
    memory_efficiency: Efficiency = 1.0
    """Share of the memory bandwidth that training reaches."""
    link_efficiency: Efficiency = 1.0
    """Share of the links that collectives reach."""
    network_efficiency: Efficiency = 1.0
    """Share of the network that collectives reach."""
    devices: Natural = 0
    """Chips of Trainium or GPUs of a node, as Kubernetes counts them [devices]."""
    rank_counts: tuple[Count, ...] = ()
    """Ranks of a node between which its runtime has collectives; empty: any number [ranks]."""
    efa: Natural = 0
    """EFA adapters of a node [adapters]."""
    host_gbps: Positive = 20.0
    """Link of a rank to the memory of its host, one way; PCIe 4 is assumed [1e9 bytes/s]."""
    host_memory_gib: NonNegative = 0.0
    """Memory of the host [GiB]."""
    program_instructions: Natural = 0
    """Most instructions that its compiler is known to take in a program; 0: no limit."""

    def peak_flops(self, dtype: str) -> float:
        """FLOP/s of a rank's dense matrix products in ``dtype``, a value of run.dtype."""
        narrow, wide = self.bfloat16_tflops, self.float32_tflops  # that of float16 is bfloat16's
        return 1e12 * {"bfloat16": narrow, "float16": narrow, "float32": wide}[dtype]

    def memory_bytes(self) -> float:
        """Bytes of device memory of a rank."""
        return self.memory_gib * GIB

    def memory_rate(self) -> float:
        """Bytes/s of device memory that a rank reads and writes."""
        return 1e9 * self.memory_gbps * self.memory_efficiency

    def compiles(self, instructions: float) -> bool:
        """Whether its compiler is known to take a program of so many instructions."""
        return not self.program_instructions or instructions <= self.program_instructions

    @property
    def neuron(self) -> bool:
        """Whether its devices are Trainium chips."""
        return self.backend in NEURON_BACKENDS

    @property
    def backends(self) -> tuple[str, ...]:
        """Values of run.backend that use the devices."""
        return NEURON_BACKENDS if self.neuron else (self.backend,)

    @property
    def node_limit(self) -> int | None:
        """The ranks of a node where tensor and context ranks must share one, or None."""
        return node_limit(self.backend, self.ranks)

    @property
    def instance_type(self) -> str:
        """Its name where that has the form of an instance type of AWS, else empty."""
        return self.name if re.fullmatch(r"[a-z][a-z0-9-]*\.[a-z0-9-]+", self.name) else ""

    @property
    def unit(self) -> str:
        """What a rank runs on, in the plural."""
        return {"cuda": "GPUs", "cpu": "cores"}.get(self.backend, "NeuronCores")

    @property
    def resource(self) -> str:
        """The name of the devices in Kubernetes."""
        return "aws.amazon.com/neuron" if self.neuron else "nvidia.com/gpu"

    @property
    def monitor(self) -> str:
        """The program that shows how busy the devices are."""
        return {"cuda": "nvidia-smi dmon", "cpu": "top"}.get(self.backend, "neuron-top")

    def with_ranks(self, ranks: int) -> Machine:
        """The same node with ``ranks`` of its devices in use, or with its cores cut into so many.

        Raises ConfigError if there are fewer devices.
        """
        if self.backend != "cpu":
            if ranks > self.ranks:
                raise ConfigError(
                    f"`ranks={ranks}` is more than the {count(self.ranks, 'device')} of "
                    f"{self.name}; use {self.ranks} or fewer"
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


REQUIRED = [
    each.name for each in fields(Machine) if each.default is MISSING and each.name != "name"
]

# The machine that a job is started on: no device, any number of ranks.
LOCAL = Machine("local", "cpu", 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def load_machine(name_or_path: str) -> Machine:
    """The machine of a name in ``hardware.toml``, of a user's TOML file, or this one (``cpu``).

    Names are compared without case.  A file of several machines is given as FILE.toml:NAME.  Raises
    ConfigError if there is no such machine, and one that lists every problem if a file does not
    describe a machine.
    """
    if name_or_path.lower() == THIS:
        return measure_machine()
    if in_file(name_or_path):
        file, _, table = name_or_path.partition(".toml:")
        return _one(Path(f"{file}.toml" if table else name_or_path), table)
    machine = find_machine(name_or_path)
    if machine is None:
        raise ConfigError(
            f"`instance` {name_or_path} is neither a TOML file nor a machine that is known"
            f"{near_machines(name_or_path, [THIS, *_by_name()])}"
        )
    return machine


def near_machines(name: str, names: Iterable[str]) -> str:
    """``; did you mean ...?`` for an unknown machine: sizes of its family, or near names."""
    family = [each for each in names if name and each.startswith(name.lower())]
    return f"; did you mean {join_or(family)}?" if family else did_you_mean(name, names)


def in_file(name_or_path: str) -> bool:
    """Whether a machine is named by a user's file: FILE.toml, or FILE.toml:NAME."""
    return name_or_path.endswith(".toml") or ".toml:" in name_or_path


def find_machine(name: str) -> Machine | None:
    """The known machine of a name, in any case; None if there is none."""
    return _by_name().get(name.lower())


def gpu_peak_flops(name: str, dtype: str) -> float | None:
    """FLOP/s of dense matrix products in ``dtype`` of a GPU; None if the GPU is not known.

    ``name`` is what torch.cuda.get_device_name returns.  Only whole names are compared: variants of
    a GPU, and parts of one, have other peaks.
    """
    name = name.lower().removeprefix("nvidia ")
    for machine in known_machines().values():
        if name in map(str.lower, machine.gpu_names):
            return machine.peak_flops(dtype)
    return None


@cache
def known_machines() -> dict[str, Machine]:
    """The machines of ``hardware.toml`` by name."""
    return {name: _machine(name, table, KNOWN) for name, table in _known_tables().items()}


def machine_names() -> list[str]:
    """The names of machines that ``load_machine`` takes, without their other names."""
    return [THIS, *_known_tables()]


def default_machine(backend: str) -> str:
    """The name of the machine that a run on ``backend`` is planned for: the first in the table."""
    matching = (name for name, machine in known_machines().items() if machine.backend == backend)
    return next(matching, THIS)


def _by_name() -> dict[str, Machine]:
    """The known machines by every name that they have."""
    machines = known_machines().items()
    also = {other: machine for _, machine in machines for other in machine.also}
    return {**dict(machines), **also}


@cache
def _known_tables() -> dict[str, dict[str, Any]]:
    return _tables(KNOWN)


def _one(path: Path, name: str = "") -> Machine:
    """The machine of a user's file; of several, the one of that name."""
    tables = _tables(path)
    if not tables:
        raise ConfigError(f'{path}: has 0 tables; write one such as [my-node] with like = "h100"')
    if not name and len(tables) > 1:
        raise ConfigError(
            f"{path}: has {len(tables)} tables, each a machine; add "
            f"{join_or([f':{each}' for each in tables])} to the file's name"
        )
    name = name or next(iter(tables))
    if name not in tables:
        raise ConfigError(f"{path}: has no table [{name}]{did_you_mean(name, tables)}")
    return _machine(name, tables[name], path)


def _tables(path: Path) -> dict[str, dict[str, Any]]:
    tables = read_toml(path)
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {name} stands outside a table; begin with [my-node]")
    return tables


def _machine(name: str, table: dict[str, Any], path: Path) -> Machine:
    """The machine that a table describes; ``like`` names a known one for the missing figures."""
    problems = Problems()
    if "like" in table:
        table = {**_shared(f"{name}.like", table["like"], problems), **table}
    values = {key: value for key, value in table.items() if key != "like"}
    missing = [f"{name}.{key}" for key in REQUIRED if key not in values]
    machine = build(Machine, values, problems, name, {"name": name})
    lines = problems.lines(machine, name)
    if len(missing) > 1:  # one line for all, and none where they hang on a wrong ``like``
        lines = [line for line in lines if line not in map(problems.unusable.get, missing)]
        if f"{name}.like" not in problems.unusable:
            lines.append(
                f"{', '.join(missing)} are missing; write them, or take those of a machine that is "
                f'known, such as like = "{next(iter(_known_tables()))}"'
            )
    refuse([*lines, *(_linked(machine, name) if not lines else ())], str(path))
    return machine


def _shared(key: str, like: Any, problems: Problems) -> dict[str, Any]:
    """The figures of the known machine that ``like`` names."""
    tables = {
        spelling: table
        for name, table in _known_tables().items()
        for spelling in (name, *table.get("also", ()))
    }
    if (spelling := str(like).lower()) not in tables:
        near = near_machines(spelling, tables)
        problems.unusable[key] = f"{key}={like!r} is not a machine that is known{near}"
        return {}
    table = tables[spelling]
    if "like" in table:
        table = {**_shared(key, table["like"], problems), **table}
    return {key: value for key, value in table.items() if key not in UNSHARED}


def _linked(machine: Machine, name: str) -> Iterator[str]:
    if machine.ranks > 1 and not machine.link_gbps:
        yield f"{name}.link_gbps=0 with {machine.ranks} ranks; write what one rank sends"


def memory_share(whole: int, root: Path = Path("/")) -> int:
    """Bytes of memory that this control group may use, on a machine with ``whole`` bytes."""
    for limit in CGROUP_LIMITS:
        try:
            whole = min(whole, int((root / limit).read_text()))
        except (OSError, ValueError):  # no control group of that version, or "max"
            continue
    return whole


def measure_machine(root: Path = Path("/")) -> Machine:
    """This machine, measured: a product of 1024 x 1024 float32 matrices and a copy of 64 MB.

    One rank has all cores.  Links are memory: a message is copied three times on its way.  Memory
    limits of the control group are read below ``root``.
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
        description="this machine, measured now",
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
    """Whether this CPU has units for products in bfloat16."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in flags for flag in (" avx512_bf16", " amx_bf16", " bf16"))


def _seconds(function: Any) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
