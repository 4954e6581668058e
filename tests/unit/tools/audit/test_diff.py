"""The difference of two programs."""

from __future__ import annotations

from support.hlo_text import program_of

from llamax.tools.audit import diff


def test_the_difference_is_the_instruction_that_the_other_lacks() -> None:
    ours = program_of(
        "%p.1 = s32[4]{0} parameter(0)",
        '%c.2 = s32[] constant(0), metadata={source_file="/a/tensor.py" source_line=120}',
        "%b.3 = s32[4]{0} broadcast(s32[] %c.2), dimensions={}",
        "%s.4 = s32[4]{0} subtract(s32[4]{0} %p.1, s32[4]{0} %b.3)",
    )
    theirs = program_of(
        "%p.1 = s32[4]{0} parameter(0)",
        '%c.2 = s32[] constant(4000), metadata={source_file="/a/tensor.py" source_line=120}',
        "%b.3 = s32[4]{0} broadcast(s32[] %c.2), dimensions={}",
        "%s.4 = s32[4]{0} subtract(s32[4]{0} %p.1, s32[4]{0} %b.3)",
    )
    how = diff.difference(ours, theirs)
    assert how is not None
    assert diff.describe(how.expected) == "s32[] constant(0) at /a/tensor.py:120"
    assert diff.describe(how.found) == "s32[] constant(4000) at /a/tensor.py:120"
    assert diff.difference(ours, ours) is None
    assert diff.describe(None) == "nothing"


def test_wiring_alone_is_a_difference_too() -> None:
    lines = [
        "%p.1 = f32[] parameter(0)",
        "%p.2 = f32[] parameter(1)",
        "%s.3 = f32[] subtract(f32[] %p.1, f32[] %p.2)",
    ]
    swapped = "%s.3 = f32[] subtract(f32[] %p.2, f32[] %p.1)"
    how = diff.difference(program_of(*lines), program_of(*lines[:2], swapped))
    assert how is not None
    assert how.expected is not None
    assert how.expected.opcode == "subtract"
