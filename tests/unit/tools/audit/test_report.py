"""The audit's verdict: passes, and failures with their line."""

from __future__ import annotations

import json

from support.hlo_text import MATMUL

from llamax.tools.audit import census
from llamax.tools.audit.report import AuditReport, Kind, Memory, as_json, show, sort_kinds


def audited(*programs: tuple[str, str, str]) -> AuditReport:
    first, _, found = sort_kinds(programs)
    kinds = tuple(
        Kind(name, each, ("step 1", "step 2"), (), None, 100.0, 0.5) for name, each in first.items()
    )
    live = {name: census.live(each) for name, each in first.items()}
    memory = Memory(2**30, 2**30, 2**30, live, 16 * 2**30)
    return AuditReport("a run", kinds, ("all 4 agree",), 2, memory, tuple(found))


def test_an_audit_passes_where_every_step_is_one_program() -> None:
    audit = audited(("microstep", "step 1", MATMUL), ("microstep", "step 2", MATMUL))
    assert audit.passes
    text = "\n".join(show(audit))
    assert "microstep                  6        3    0.5s   step 1 and 1 more" in text
    assert "memory of a core: 3.00 GiB of 16 GiB, estimated: fits" in text
    assert "dynamic shapes: none" in text
    numbers = json.loads(json.dumps(as_json(audit)))
    assert numbers["passes"] is True
    assert numbers["programs"]["microstep"]["matmul_flops"] == 128
    assert numbers["memory_bytes"]["available"] == 16 * 2**30


def test_an_audit_fails_with_the_line_where_a_step_differs() -> None:
    other = MATMUL.replace(
        "constant(0)", 'constant(3), metadata={source_file="/a/optim.py" source_line=9}'
    )
    audit = audited(
        ("update", "rank 0, step 1", MATMUL),
        ("update", "rank 0, step 2", other),
    )
    assert not audit.passes
    (problem,) = audit.problems
    assert problem == (
        "the update program of rank 0, step 2 differs from that of rank 0, step 1: "
        "f32[] constant(3) at /a/optim.py:9 instead of f32[] constant(0); what depends on the rank "
        "or the step must enter as a tensor"
    )


def test_an_audit_fails_on_what_the_compiler_refuses() -> None:
    audit = audited(("microstep", "step 1", MATMUL.replace("f32[]", "f64[]")))
    assert "the microstep program has float64" in audit.problems[0]
    hosted = AuditReport("", (), (), 1, audit.memory, fallbacks=("aten::nonzero",))
    assert hosted.problems == ["aten::nonzero runs on the host: torch-xla cannot compile it"]
