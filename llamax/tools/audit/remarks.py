"""What the compiler for Trainium refuses in a program, or does badly.

Sources: AWS Neuron, "Graph Compiler error codes" (EMOD025, EVRF061, EVRF063), and neuronx-cc's
options --native-int64 and --implicit-integer-downcast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llamax.tools.audit.hlo import Program

DYNAMIC = "a shape that depends on values"
DOUBLE = "float64, which NeuronCores do not support"
WIDE = "int64 arrays, twice the bytes of int32"
EMPTY = "arrays without elements"
INTEGER_SUM = "integers summed over ranks, which Neuron does in float32: exact up to 2^24"
INTEGERS = {"s32", "u32", "s64", "u64"}


@dataclass(frozen=True)
class Remark:
    """Something in a program that the compiler for Trainium refuses (``fatal``) or does badly."""

    fatal: bool
    what: str
    count: int
    source: str


def remarks_on(program: Program) -> list[Remark]:
    """The remarks on a program, worst first; ``source`` is the first Python line that made it."""
    found: dict[tuple[bool, str], list[str]] = {}
    for fatal, what, source in _remarks(program):
        found.setdefault((fatal, what), []).append(source)
    rows = [
        Remark(fatal, what, len(sources), next(filter(None, sources), ""))
        for (fatal, what), sources in found.items()
    ]
    return sorted(rows, key=lambda row: (not row.fatal, -row.count))


def _remarks(program: Program) -> Iterator[tuple[bool, str, str]]:
    for each in program.instructions:
        dtypes = {shape.dtype for shape in each.shapes}
        if any(shape.dynamic for shape in each.shapes):
            yield True, DYNAMIC, each.source
        if "f64" in dtypes:
            yield True, DOUBLE, each.source
        if "s64" in dtypes and each.shape.dims:
            yield False, WIDE, each.source
        if any(shape.elements == 0 for shape in each.shapes):
            yield False, EMPTY, each.source
        if each.opcode in ("all-reduce", "reduce-scatter") and dtypes & INTEGERS:
            yield False, INTEGER_SUM, each.source
