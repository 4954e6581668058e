"""What the compiler for Trainium refuses or does badly, read from HLO text."""

from __future__ import annotations

from support.hlo_text import program_of

from llamax.tools.audit.remarks import INTEGER_SUM, remarks_on


def test_remarks_name_the_first_line() -> None:
    program = program_of(
        '%p.1 = s64[4]{0} parameter(0), metadata={source_file="/a/b.py" source_line=1}',
        "%p.2 = s64[] parameter(1)",
        "%f.3 = f64[] constant(0.5)",
        '%f.4 = f64[] constant(0.5), metadata={source_file="/a/b.py" source_line=2}',
        '%d.5 = f32[<=4]{0} custom-call(s64[4]{0} %p.1), metadata={source_file="/a/b.py" source_line=3}',  # noqa: E501
        "%e.6 = f32[0]{0} slice(f32[<=4]{0} %d.5)",
    )
    found = [(each.fatal, each.count, each.source) for each in remarks_on(program)]
    assert found == [(True, 2, "/a/b.py:2"), (True, 1, "/a/b.py:3"), (False, 1, "/a/b.py:1"),
                     (False, 1, "")]  # fmt: skip


def test_sums_of_integers_over_ranks_are_named() -> None:
    program = program_of(
        "%p.1 = s32[4]{0} parameter(0)",
        "%f.2 = f32[4]{0} convert(s32[4]{0} %p.1)",
        "%r.3 = f32[4]{0} all-reduce(f32[4]{0} %f.2), replica_groups={{0,1}}, to_apply=%a",
        "%g.4 = s32[8]{0} all-gather(s32[4]{0} %p.1), replica_groups={{0,1}}, dimensions={0}",
        "%r.5 = s32[4]{0} all-reduce(s32[4]{0} %p.1), replica_groups={{0,1}}, to_apply=%a",
        "%s.6 = s32[4]{0} reduce-scatter(s32[8]{0} %g.4), replica_groups={{0,1}}, to_apply=%a",
    )
    assert [(each.what, each.count) for each in remarks_on(program)] == [(INTEGER_SUM, 2)]
