"""Compares the programs of many ranks of one run with those that are expected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llamax.backends.tracing import Tracer
from llamax.runtime.progress import tracked
from llamax.runtime.units import count
from llamax.tools.audit import hlo
from llamax.tools.audit.diff import difference
from llamax.tools.audit.rank_numbers import Places, Watch
from llamax.tools.audit.report import Divergence
from llamax.tools.audit.trace import Boundary, TracedRun
from llamax.training.resolve import ResolvedRun


def compare(
    run: ResolvedRun,
    tracer: Tracer,
    data: Path,
    ranks: Sequence[int],
    expected: dict[str, str],
    watch: Watch | None = None,
) -> list[Divergence]:
    """The first program of ``ranks`` that differs from the ``expected`` text of its kind, if any.

    Without an expected text the first rank sets it.  With a ``watch`` a rank is not traced where
    its trace would go as an earlier one.  Python lines are traced only for the two programs that
    differ.
    """
    layers = run.config.model.num_hidden_layers
    expected, first = dict(expected), 0 if expected else ranks[0]
    with tracer.without_debug():
        for rank in tracked(ranks, f"tracing {count(layers, 'layer')}", len(ranks), "rank"):
            if watch is not None and watch.knows(rank):
                continue
            for boundary in programs(run, rank, tracer, data, watch):
                text = hlo.normal(boundary.text)
                if expected.setdefault(boundary.kind, text) != text:
                    return [explain(run, tracer, data, first, rank, boundary.kind)]
    return []


def programs(
    run: ResolvedRun, rank: int, tracer: Tracer, data: Path, watch: Watch | None = None
) -> list[Boundary]:
    """Each program of a rank once; the ``watch`` notes which of its places they depend on."""
    if watch is None:
        return [*TracedRun(run, rank, tracer, data).brief()]
    if watch.watches:
        used: Places = {}
        try:
            with tracer.forbid_reads():
                found = [*TracedRun(run, rank, tracer, data, used).brief()]
        except Exception:  # something that takes ints alone, or a fault, which is raised again
            watch.watches = False
            tracer.clear_pending()
        else:
            watch.note(used)
            return found
    watch.note(watch.places(rank))
    return programs(run, rank, tracer, data)


def explain(
    run: ResolvedRun, tracer: Tracer, data: Path, rank: int, other: int, kind: str
) -> Divergence:
    """The difference between the programs of two ranks, with Python lines."""
    tracer.debug(True)
    expected, found = (
        next(
            hlo.read(boundary.text)
            for boundary in TracedRun(run, each, tracer, data).brief()
            if boundary.kind == kind
        )
        for each in (rank, other)
    )
    how = difference(expected, found)
    assert how is not None
    return Divergence(kind, f"rank {other}", f"rank {rank}", how)
