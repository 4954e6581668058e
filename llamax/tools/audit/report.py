"""The result of an audit, as text and as JSON.

An audit *passes* where the run would compile each program once for the whole cluster: every rank
and every step of a kind trace one program, the compiler refuses nothing in it, and a core has the
memory for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property

from llamax.config.neuron_sdk import NeuronSdk, trn1_sdk
from llamax.runtime.units import show_bytes, show_number
from llamax.tools.audit import census, hlo
from llamax.tools.audit.census import Live, Traffic, Work
from llamax.tools.audit.diff import Difference, describe, difference
from llamax.tools.audit.hlo import Program
from llamax.tools.audit.remarks import DYNAMIC, Remark, remarks_on


@dataclass(frozen=True)
class Kind:
    """One kind of program, such as the microstep.

    ``traced``: where it was traced; ``formula``: its collectives by formula; ``model_flops``: its
    FLOPs by formula.
    """

    name: str
    program: Program
    traced: tuple[str, ...]
    collectives: tuple[Traffic, ...]
    formula: tuple[Traffic, ...] | None
    model_flops: float
    trace_s: float

    @cached_property
    def work(self) -> Work:
        return census.work(self.program)

    @cached_property
    def communicators(self) -> int:
        return census.communicators(self.program)

    @cached_property
    def remarks(self) -> list[Remark]:
        return remarks_on(self.program)


@dataclass(frozen=True)
class Divergence:
    """A program that differs from the first of its kind, and where it was traced."""

    kind: str
    where: str
    expected: str
    how: Difference

    def __str__(self) -> str:
        return (
            f"the {self.kind} program of {self.where} differs from that of {self.expected}: "
            f"{describe(self.how.found)} instead of {describe(self.how.expected)}; what depends on "
            "the rank or the step must enter as a tensor"
        )


@dataclass(frozen=True)
class Memory:
    """Bytes of one core: resident, reserved, live during each program, and available."""

    weights: int
    gradients: int
    optimizer: int
    reserve: int  # for the runtime and programs, as the planner counts it
    live: dict[str, Live]
    available: float
    in_flight: int = 0  # kept of the microbatches between their passes through a stage
    cache: int = 0  # of keys and values

    @property
    def resident(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.in_flight + self.cache

    @property
    def fullest(self) -> str:
        """The kind of program that needs most."""
        return max(self.live, key=lambda name: self.live[name].added_bytes)

    @property
    def peak(self) -> int:
        return self.resident + self.reserve + self.live[self.fullest].added_bytes

    @property
    def fits(self) -> bool:
        return self.peak <= self.available


@dataclass(frozen=True)
class AuditReport:
    """The result of an audit."""

    headline: str
    kinds: tuple[Kind, ...]
    ranks: tuple[str, ...]
    layers: int
    memory: Memory
    divergences: tuple[Divergence, ...] = ()
    fallbacks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sdk: NeuronSdk = field(default_factory=trn1_sdk)

    @property
    def problems(self) -> list[str]:
        """The reasons why a program would be compiled more than once or not at all."""
        found = [str(each) for each in self.divergences]
        found += [
            f"{name} runs on the host: torch-xla cannot compile it" for name in self.fallbacks
        ]
        for kind in self.kinds:
            found += [
                f"the {kind.name} program has {remark.what}: {remark.count} instructions, the "
                f"first at {remark.source or 'an unknown line'}"
                for remark in kind.remarks
                if remark.fatal
            ]
            if kind.communicators > self.sdk.communicators:
                found.append(
                    f"the {kind.name} program has {kind.communicators} communicators, of which "
                    f"Neuron SDK {self.sdk.name} loads {self.sdk.communicators}; use fewer axes of "
                    "the mesh"
                )
        return found

    @property
    def passes(self) -> bool:
        return not self.problems and self.memory.fits

    @property
    def does_not_fit(self) -> str:
        """What a core lacks, in one line; empty where the run fits."""
        memory = self.memory
        if memory.fits:
            return ""
        return (
            f"a core needs {show_bytes(memory.peak)} of {show_bytes(memory.available)} in the "
            f"{memory.fullest} program; llamax plan --search lists layouts that fit"
        )


def sort_kinds(
    traced: Iterable[tuple[str, str, str]],
) -> tuple[dict[str, Program], dict[str, list[str]], list[Divergence]]:
    """Sort (kind, when, HLO text): the first program of each kind, the times when a kind was
    traced, and the later programs that differ from the first."""
    first: dict[str, Program] = {}
    when: dict[str, list[str]] = {}
    divergences: list[Divergence] = []
    for kind, at, text in traced:
        when.setdefault(kind, []).append(at)
        if kind not in first:
            first[kind] = hlo.read(text)
        elif hlo.normal(text) != first[kind].normal:
            how = difference(first[kind], hlo.read(text))
            assert how is not None
            divergences.append(Divergence(kind, at, when[kind][0], how))
    return first, when, divergences


def show(audit: AuditReport) -> Iterator[str]:
    """The audit as lines of text."""
    yield audit.headline
    yield ""
    width = max(16, *(len(kind.name) for kind in audit.kinds))
    yield f"{'programs':<{width + 2}}instructions  a layer   trace   same at"
    for kind in audit.kinds:
        count = len(kind.program.instructions)
        yield (
            f"  {kind.name:<{width}}{count:>12,}{count // audit.layers:>9,}{kind.trace_s:>7.1f}s   "
            f"{kind.traced[0]}" + (f" and {len(kind.traced) - 1} more" if kind.traced[1:] else "")
        )
    yield ""
    yield from (f"ranks: {line}" for line in audit.ranks)
    for kind in audit.kinds:
        yield from _show_collectives(kind)
    yield ""
    most = max((kind.communicators for kind in audit.kinds), default=0)
    yield (
        f"communicators: {most} at most in a program; Neuron SDK {audit.sdk.name} loads "
        f"{audit.sdk.communicators}"
    )
    yield ""
    width = max(17, *(len(kind.name) for kind in audit.kinds if kind.model_flops))
    yield (f"{'work of a rank':<{width}}   matmul FLOPs   share of all      model FLOPs   ratio")
    for kind in audit.kinds:
        if kind.model_flops:
            work = kind.work
            yield (
                f"  {kind.name:<{width}}{show_number(work.matmul_flops):>13}"
                f"{work.matmul_share:>14.2%}{show_number(kind.model_flops):>16}"
                f"{work.matmul_flops / kind.model_flops:>10.2f}"
            )
    yield from _show_memory(audit.memory)
    yield ""
    yield f"operations on the host: {', '.join(audit.fallbacks) or 'none'}"
    remarks = [(kind.name, remark) for kind in audit.kinds for remark in kind.remarks]
    for name, remark in remarks:
        yield f"{name}: {remark.count} x {remark.what} ({remark.source or 'unknown line'})"
    if not any(remark.what == DYNAMIC for _, remark in remarks):
        yield "dynamic shapes: none"
    yield from (f"note: {note}" for note in audit.notes)


def _show_collectives(kind: Kind) -> Iterator[str]:
    yield ""
    yield f"collectives of {_a(kind.name):<24} count   sent by a rank   by formula"
    expected = {(traffic.axis, traffic.kind): traffic for traffic in kind.formula or ()}
    traced = {(traffic.axis, traffic.kind): traffic for traffic in kind.collectives}
    for axis, verb in dict.fromkeys([*traced, *expected]):
        none = Traffic(verb, axis, 0, 0)
        measured, computed = traced.get((axis, verb), none), expected.get((axis, verb), none)
        formula = "-" if kind.formula is None else _counted(computed)
        yield (
            f"  {axis:<7} {verb:<27}{measured.count:>7,}{show_bytes(measured.sent_bytes):>17}   "
            f"{'the same' if measured == computed else formula}"
        )


def _counted(traffic: Traffic) -> str:
    return f"{traffic.count:,}, {show_bytes(traffic.sent_bytes)}" if traffic.count else "none"


_TRAINING = ("weights", "gradients", "optimizer", "reserve")


def _show_memory(memory: Memory) -> Iterator[str]:
    yield ""
    available = show_bytes(memory.available)
    fits = "fits" if memory.fits else "DOES NOT FIT"
    yield f"memory of a core: {show_bytes(memory.peak)} of {available}, estimated: {fits}"
    names = ("weights", "cache", "reserve") if memory.cache else _TRAINING
    for name in names:
        yield f"  {name:<24}{show_bytes(getattr(memory, name)):>10}"
    if memory.in_flight:
        yield f"  {'microbatches in flight':<24}{show_bytes(memory.in_flight):>10}"
    width = max(24, *(len(f"live in {_a(name)}") for name in memory.live))
    for name, live in memory.live.items():
        in_place = f"   {show_bytes(live.replaced_bytes)} of new weights replace the old ones"
        yield f"  {'live in ' + _a(name):<{width}}{show_bytes(live.added_bytes):>10}" + (
            in_place if live.replaced_bytes else ""
        )


def _a(kind: str) -> str:
    """A kind of program with its article."""
    return f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind}"


def as_json(audit: AuditReport) -> dict[str, object]:
    """The audit for programs; ``sha256`` is the hash of a program's normal text."""
    return {
        "passes": audit.passes,
        "fits": audit.memory.fits,
        "problems": [*audit.problems, *filter(None, [audit.does_not_fit])],
        "programs": {
            kind.name: {
                "sha256": hlo.digest(kind.program.normal),
                "instructions": len(kind.program.instructions),
                "traced": list(kind.traced),
                "trace_s": kind.trace_s,
                "communicators": kind.communicators,
                "collectives": [asdict(each) for each in kind.collectives],
                "by_formula": kind.formula and [asdict(each) for each in kind.formula],
                "matmul_flops": kind.work.matmul_flops,
                "matmul_share": kind.work.matmul_share,
                "model_flops": kind.model_flops,
                "remarks": [asdict(each) for each in kind.remarks],
            }
            for kind in audit.kinds
        },
        "ranks": list(audit.ranks),
        "memory_bytes": {
            "weights": audit.memory.weights,
            "gradients": audit.memory.gradients,
            "optimizer": audit.memory.optimizer,
            "reserve": audit.memory.reserve,
            "cache": audit.memory.cache,
            "live": {
                name: {**asdict(live), "added_bytes": live.added_bytes}
                for name, live in audit.memory.live.items()
            },
            "peak": audit.memory.peak,
            "available": audit.memory.available,
        },
        "neuron_sdk": audit.sdk.name,
        "most_communicators": audit.sdk.communicators,
        "fallbacks": list(audit.fallbacks),
        "notes": list(audit.notes),
    }
