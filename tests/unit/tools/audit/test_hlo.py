"""HLO text: instructions, shapes, fingerprints."""

from __future__ import annotations

import re

import pytest

from llamax.tools.audit import diff, hlo

MATMUL = """HloModule IrToHlo.9, entry_computation_layout={(f32[8,2]{1,0}, f32[2,4]{1,0})->(f32[4]{0})}

%Add.4 (x.5: f32[], y.6: f32[]) -> f32[] {
  %x.5 = f32[] parameter(0)
  %y.6 = f32[] parameter(1)
  ROOT %add.7 = f32[] add(f32[] %x.5, f32[] %y.6)
}

ENTRY %IrToHlo.9 (p0.1: f32[8,2], p1.2: f32[2,4]) -> (f32[4]) {
  %p1.2 = f32[2,4]{1,0} parameter(1), metadata={op_type="xla__device_data" op_name="x" source_file="/a/model.py" source_line=3}
  %p0.1 = f32[8,2]{1,0} parameter(0)
  %dot.3 = f32[8,4]{1,0} dot(f32[8,2]{1,0} %p0.1, f32[2,4]{1,0} %p1.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_type="aten__mm" op_name="m" source_file="/a/model.py" source_line=7}
  %constant.1 = f32[] constant(0)
  %reduce.8 = f32[4]{0} reduce(f32[8,4]{1,0} %dot.3, f32[] %constant.1), dimensions={0}, to_apply=%Add.4
  ROOT %tuple.8 = (f32[4]{0}) tuple(f32[4]{0} %reduce.8)
}
"""  # noqa: E501


def entry(*lines: str) -> hlo.Program:
    """A program of these lines; its root is the last."""
    *rest, last = lines
    return hlo.read(
        "\n".join(["HloModule m", "", "ENTRY %m () -> f32[] {", *rest, f"ROOT {last}", "}"])
    )


def test_an_instruction_says_everything() -> None:
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
    with pytest.raises(ValueError, match="no HLO instruction: %a = nonsense"):
        entry("%a = nonsense", "%b = f32[] constant(0)")
    with pytest.raises(ValueError, match="does not close its operands"):
        entry("%a = f32[] add(f32[] %b, (f32[] %c)", "%b = f32[] constant(0)")
