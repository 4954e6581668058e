"""The audit's verdict: passes, and failures with their line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from support.documented import documented
from support.hlo_text import MATMUL

from llamax.cli.audit import main
from llamax.config.neuron_sdk import known_sdks
from llamax.tools.audit import auditor, census
from llamax.tools.audit.report import AuditReport, Kind, Memory, as_json, show, sort_kinds


def audited(*programs: tuple[str, str, str], available: float = 16 * 2**30) -> AuditReport:
    first, _, found = sort_kinds(programs)
    kinds = tuple(
        Kind(name, each, ("step 1", "step 2"), (), None, 100.0, 0.5) for name, each in first.items()
    )
    live = {name: census.live(each) for name, each in first.items()}
    memory = Memory(2**30, 2**30, 2**30, 2**29, live, available)
    return AuditReport("a run", kinds, ("all 4 agree",), 2, memory, tuple(found))


def test_an_audit_passes_where_every_step_is_one_program() -> None:
    audit = audited(("microstep", "step 1", MATMUL), ("microstep", "step 2", MATMUL))
    assert audit.passes
    text = "\n".join(show(audit))
    assert "microstep                  6        3    0.5s   step 1 and 1 more" in text
    assert "memory of a core: 3.50 GiB of 16 GiB, estimated: fits" in text
    assert "dynamic shapes: none" in text
    numbers = json.loads(json.dumps(as_json(audit)))
    assert numbers.keys() == documented("llamax audit")
    assert numbers["passes"] is True
    assert numbers["programs"]["microstep"]["matmul_flops"] == 128
    assert numbers["memory_bytes"]["available"] == 16 * 2**30


def test_an_audit_fails_where_a_program_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    audit = audited(("microstep", "step 1", MATMUL), available=3 * 2**30)
    assert not audit.passes
    assert audit.problems == []
    line = "memory of a core: 3.50 GiB of 3 GiB, estimated: DOES NOT FIT"
    assert line in show(audit)
    numbers = json.loads(json.dumps(as_json(audit)))
    assert (numbers["passes"], numbers["fits"]) == (False, False)
    assert numbers["problems"] == [audit.does_not_fit]
    monkeypatch.setattr(auditor, "audit", lambda *_, **__: audit)
    assert main(["--config", "llama2-7b"]) == 6
    assert capsys.readouterr().err == (
        "llamax: a core needs 3.50 GiB of 3 GiB in the microstep program; llamax plan --search "
        "lists layouts that fit\n"
    )
    monkeypatch.setattr(auditor, "audit", lambda *_, **__: audited(("update", "1", MATMUL)))
    assert main(["--config", "llama2-7b"]) == 0


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


def reduced(groups: int) -> str:
    """A program whose all-reduces group eight ranks in so many ways, each twice."""
    lines = [
        f"  %all-reduce.{i} = f32[4]{{0}} all-reduce(f32[4]{{0}} %reduce.8), "
        f"replica_groups={{{{0,{1 + i % groups}}},{{2,{3 + i % groups}}}}}, to_apply=%Add.4\n"
        for i in range(2 * groups)
    ]
    return MATMUL.replace("  ROOT %tuple", "".join(lines) + "  ROOT %tuple")


@pytest.mark.parametrize(("sdk", "most"), [("2.28", 12), ("2.31", 12), ("2.32", 16)])
def test_an_audit_fails_where_the_runtime_loads_no_program(sdk: str, most: int) -> None:
    for groups in (1, most, most + 1):
        audit = audited(("update", "step 1", reduced(groups)))
        audit = replace(audit, sdk=known_sdks()[sdk])
        assert audit.kinds[0].communicators == groups
        numbers = json.loads(json.dumps(as_json(audit)))
        assert numbers["programs"]["update"]["communicators"] == groups
        assert (numbers["neuron_sdk"], numbers["most_communicators"]) == (sdk, most)
        line = f"communicators: {groups} at most in a program; Neuron SDK {sdk} loads {most}"
        assert line in show(audit)
        assert audit.passes == (groups <= most)
        if groups > most:
            assert audit.problems == [
                f"the update program has {groups} communicators, of which Neuron SDK {sdk} loads "
                f"{most}; use fewer axes of the mesh"
            ]
