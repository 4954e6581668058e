"""The limits and costs of a NeuronCore-v2, and the errors and the tally of a simulated kernel.

Source of every number: the AWS Neuron documentation.  Sizes, clocks and start partitions: the
architecture guide of Trainium and Inferentia2 for NKI (SDK 2.28).  Cycles of an instruction:
"Estimated instruction cost" in the reference of ``nki.isa`` (SDK 2.22, the last that prints them).
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

PARTITIONS = 128
SBUF_BYTES = 192 * 1024  # of a partition
PSUM_BANKS = 8
BANK_BYTES = 2048  # of a partition; a bank holds 512 float32 sums
STATIONARY_COLUMNS = 128
MOVING_COLUMNS = 512
PSUM_FREE = 4096  # elements of a partition that an instruction reads or writes in PSUM
SBUF_FREE = 65536  # and in SBUF
START_PARTITIONS = {32: (0, 32, 64, 96), 64: (0, 64), 128: (0,)}  # by the partitions of a tile

CLOCK_HZ = {"tensor": 2.8e9, "vector": 1.12e9, "scalar": 1.4e9, "gpsimd": 1.4e9}
DMA_BYTES_PER_S = 272e9  # 16 engines of a core
FULL_DESCRIPTOR_BYTES = 512  # shorter runs of contiguous bytes waste the DMA engines
LEAST_CYCLES = 64  # of any instruction, also of the matrix product
GPSIMD_START_CYCLES = 150
# Pairs of engines that cannot use a memory at the same time.
PORTS = {"psum": ("vector", "scalar"), "sbuf": ("vector", "gpsimd")}


class NkiError(Exception):
    """A kernel broke a rule of the machine or of NKI; the message begins with its file and line."""


def kernel_line() -> str:
    """``file:line`` of the innermost frame outside the simulator."""
    here = Path(__file__).parent
    frame = sys._getframe(1)
    while frame.f_back is not None and Path(frame.f_code.co_filename).parent == here:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def fail(message: str) -> NoReturn:
    """Raise ``NkiError`` with the kernel's line."""
    raise NkiError(f"{kernel_line()}: {message}")


def need(condition: bool, message: str) -> None:
    """Raise ``NkiError`` unless the condition holds."""
    if not condition:
        fail(message)


@dataclass
class Tally:
    """The work of a kernel: cycles of each engine, bytes to and from HBM, most memory in use.

    An engine's time is its cycles at its clock, as if no instruction waited for another.  ``ports``
    is the time for which two engines that share a memory's port use it.  The kernel cannot be
    faster than the longest of these; dependencies and start-up latencies come on top.
    """

    cycles: Counter[str] = field(default_factory=Counter)
    instructions: Counter[str] = field(default_factory=Counter)
    port_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PORTS, 0.0))
    hbm_bytes: int = 0
    dma_bytes: int = 0
    short_descriptors: int = 0
    macs: int = 0
    sbuf_bytes: int = 0  # of a partition, in use now
    sbuf_high_bytes: int = 0
    psum_banks: int = 0
    psum_high_banks: int = 0

    def engines_s(self) -> dict[str, float]:
        """Seconds for which each engine is busy, DMA among them."""
        busy = {engine: self.cycles[engine] / hertz for engine, hertz in CLOCK_HZ.items()}
        return busy | {"dma": self.dma_bytes / DMA_BYTES_PER_S}

    def bound(self) -> str:
        """The engine that is busy longest."""
        busy = self.engines_s()
        return max(busy, key=lambda engine: busy[engine])

    def seconds(self) -> float:
        """The least time of the kernel: of its busiest engine or memory port."""
        return max(*self.engines_s().values(), *self.port_s.values(), 0.0)

    def run(self, engine: str, name: str, cycles: float, memories: set[str]) -> None:
        """Count an instruction that uses these memories."""
        self.instructions[f"{engine}.{name}"] += 1
        self.cycles[engine] += max(LEAST_CYCLES, int(cycles))
        for memory, engines in PORTS.items():
            if engine in engines and memory in memories:
                self.port_s[memory] += max(LEAST_CYCLES, int(cycles)) / CLOCK_HZ[engine]


@dataclass
class State:
    """What the simulator knows of the kernel that runs."""

    tally: Tally = field(default_factory=Tally)
    dynamic_loops: int = 0  # around the instruction


STATE = State()
