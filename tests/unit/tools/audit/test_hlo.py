"""HLO text: instructions, shapes, fingerprints."""

from __future__ import annotations

import re

import pytest
from support.hlo_text import MATMUL, program_of

from llamax.tools.audit import diff, hlo


def test_all_fields_of_an_instruction_are_read() -> None:
    program = hlo.read(MATMUL)
    assert [each.opcode for each in program.instructions] == [
        "parameter", "parameter", "dot", "constant", "reduce", "tuple",
    ]  # fmt: skip
    dot = program.by_name["%dot.3"]
    assert dot.shape == hlo.Shape("f32", (8, 4))
    assert dot.nbytes == 8 * 4 * 4
    assert dot.operands == ("%p0.1", "%p1.2")
    assert dot.source == "/a/model.py:7"
    assert dot.ints("lhs_contracting_dims") == (1,)
    assert dot.ints("lhs_batch_dims") == ()
    assert "metadata" not in dot.attributes
    assert program.outputs == ("%reduce.8",)
    assert [each.literal for each in program.parameters] == ["1", "0"]


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("f32[]", ["f32[]"]),
        ("bf16[2,3]{1,0}", ["bf16[2,3]"]),
        ("(f32[4]{0}, s64[])", ["f32[4]", "s64[]"]),
        ("f32[<=10,2]{1,0}", ["f32[10,2]"]),
        ("token[]", ["token[]"]),
    ],
)
def test_shapes(text: str, shapes: list[str]) -> None:
    found = hlo.shapes(text)
    assert [str(shape) for shape in found] == shapes
    assert [shape.dynamic for shape in found] == ["<=" in text] * len(shapes)


def test_names_and_lines_do_not_make_a_program() -> None:
    other = re.sub(r"\.(\d)\b", r".7\1", MATMUL).replace("source_line=7", "source_line=8")
    assert other != MATMUL
    assert hlo.normal(other) == hlo.normal(MATMUL)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("constant(0)", "constant(1)"),
        ("f32[8,2]{1,0} %p0.1, f32[2,4]{1,0} %p1.2)", "f32[8,2]{1,0} %p1.2, f32[2,4]{1,0} %p0.1)"),
        ("dimensions={0}", "dimensions={1}"),
        (" add(f32[] %x.5", " maximum(f32[] %x.5"),
        ("f32[8,4]", "f32[4,8]"),
    ],
)
def test_anything_else_does(old: str, new: str) -> None:
    assert old in MATMUL
    assert hlo.normal(MATMUL.replace(old, new)) != hlo.normal(MATMUL)
    assert diff.difference(hlo.read(MATMUL), hlo.read(MATMUL.replace(old, new))) is not None


def test_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.read("HloModule m\n")
    with pytest.raises(ValueError, match="not an HLO instruction: %a = nonsense"):
        program_of("%a = nonsense", "%b = f32[] constant(0)")
    with pytest.raises(ValueError, match="does not close its operands"):
        program_of("%a = f32[] add(f32[] %b, (f32[] %c)", "%b = f32[] constant(0)")
