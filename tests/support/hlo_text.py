"""HLO text: a program with one product, and programs made of lines."""

from __future__ import annotations

from llamax.tools.audit import hlo

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


def program_of(*lines: str) -> hlo.Program:
    """A program of these lines; its root is the last."""
    *rest, last = lines
    return hlo.read(
        "\n".join(["HloModule m", "", "ENTRY %m () -> f32[] {", *rest, f"ROOT {last}", "}"])
    )
