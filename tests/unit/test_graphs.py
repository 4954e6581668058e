"""The HLO reader on small programs written by hand: what each line says, costs, and differs in."""

from __future__ import annotations

import json
import re

import pytest

from llamax.config.model import ModelConfig
from llamax.config.schema import Config, DataConfig, ParallelConfig, RunConfig
from llamax.parallel.mesh import Mesh
from llamax.tools.audit import census, diff, formulas, hlo
from llamax.tools.audit.census import Live, Traffic
from llamax.tools.audit.formulas import GroupShape
from llamax.tools.audit.report import AuditReport, Kind, Memory, as_json, show, sort_kinds

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

COLLECTIVES = """HloModule m

ENTRY %m (p0.1: f32[4,6]) -> f32[8,6] {
  %p0.1 = bf16[4,6]{1,0} parameter(0)
  %all-gather.2 = bf16[8,6]{1,0} all-gather(bf16[4,6]{1,0} %p0.1), replica_groups={{0,1},{2,3}}, dimensions={0}
  %reduce-scatter.3 = bf16[4,6]{1,0} reduce-scatter(bf16[8,6]{1,0} %all-gather.2), replica_groups={{0,1},{2,3}}, dimensions={0}, to_apply=%a
  %t.4 = f32[] constant(0)
  %all-reduce.5 = (bf16[4,6]{1,0}, f32[]) all-reduce(bf16[4,6]{1,0} %reduce-scatter.3, f32[] %t.4), replica_groups={{0,2},{1,3}}, to_apply=%a
  %get-tuple-element.6 = bf16[4,6]{1,0} get-tuple-element((bf16[4,6]{1,0}, f32[]) %all-reduce.5), index=0
  %collective-permute.7 = bf16[4,6]{1,0} collective-permute(bf16[4,6]{1,0} %get-tuple-element.6), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  ROOT %all-to-all.8 = bf16[4,6]{1,0} all-to-all(bf16[4,6]{1,0} %collective-permute.7), replica_groups={{0,1,2,3}}, dimensions={0}
}
"""  # noqa: E501

AXES = {"tp": ((0, 1), (2, 3)), "data": ((0, 2), (1, 3)), "world": ((0, 1, 2, 3),)}


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


def test_the_difference_is_the_instruction_that_the_other_lacks() -> None:
    ours = entry(
        "%p.1 = s32[4]{0} parameter(0)",
        '%c.2 = s32[] constant(0), metadata={source_file="/a/tensor.py" source_line=120}',
        "%b.3 = s32[4]{0} broadcast(s32[] %c.2), dimensions={}",
        "%s.4 = s32[4]{0} subtract(s32[4]{0} %p.1, s32[4]{0} %b.3)",
    )
    theirs = entry(
        "%p.1 = s32[4]{0} parameter(0)",
        '%c.2 = s32[] constant(4000), metadata={source_file="/a/tensor.py" source_line=120}',
        "%b.3 = s32[4]{0} broadcast(s32[] %c.2), dimensions={}",
        "%s.4 = s32[4]{0} subtract(s32[4]{0} %p.1, s32[4]{0} %b.3)",
    )
    how = diff.difference(ours, theirs)
    assert how is not None
    assert diff.describe(how.mine) == "s32[] constant(0) at /a/tensor.py:120"
    assert diff.describe(how.theirs) == "s32[] constant(4000) at /a/tensor.py:120"
    assert diff.difference(ours, ours) is None
    assert diff.describe(None) == "nothing"


def test_wiring_alone_is_a_difference_too() -> None:
    lines = [
        "%p.1 = f32[] parameter(0)",
        "%p.2 = f32[] parameter(1)",
        "%s.3 = f32[] subtract(f32[] %p.1, f32[] %p.2)",
    ]
    swapped = "%s.3 = f32[] subtract(f32[] %p.2, f32[] %p.1)"
    how = diff.difference(entry(*lines), entry(*lines[:2], swapped))
    assert how is not None
    assert how.mine is not None
    assert how.mine.opcode == "subtract"


def test_collectives_by_axis_with_the_bytes_of_rings() -> None:
    part = 4 * 6 * 2
    assert census.collectives(hlo.read(COLLECTIVES), AXES) == [
        Traffic("all-gather", "tp", 1, part),
        Traffic("reduce-scatter", "tp", 1, part),
        Traffic("all-reduce", "data", 1, part),
        Traffic("collective-permute", "other", 1, part),
        Traffic("all-to-all", "world", 1, part * 3 // 4),
    ]


def test_flops() -> None:
    work = census.work(hlo.read(MATMUL))
    assert work.matmul_flops == 2 * 8 * 2 * 4
    assert work.other_flops == 8 * 4
    assert work.matmul_share == 128 / 160
    assert census.Work(0, 0).matmul_share == 0.0


def test_live_bytes_of_a_chain() -> None:
    """a and b overlap; c takes a's place; the element-wise step between is fused."""
    n = 4 * 100
    program = entry(
        "%p.1 = f32[100]{0} parameter(0)",
        "%a.2 = f32[10,100]{1,0} dot(f32[100]{0} %p.1, f32[100]{0} %p.1)",
        "%e.3 = f32[10,100]{1,0} exponential(f32[10,100]{1,0} %a.2)",
        "%b.4 = f32[20,100]{1,0} dot(f32[10,100]{1,0} %e.3, f32[100]{0} %p.1)",
        "%c.5 = f32[5,100]{1,0} dot(f32[20,100]{1,0} %b.4, f32[100]{0} %p.1)",
        "%d.6 = f32[7]{0} reduce(f32[5,100]{1,0} %c.5, f32[100]{0} %p.1)",
    )
    assert census.live(program) == Live(n, 7 * 4, 30 * n - 7 * 4)


def test_an_input_lends_its_memory_to_an_output_of_its_shape() -> None:
    program = entry(
        "%p.1 = f32[100]{0} parameter(0)",
        "%q.2 = f32[100]{0} parameter(1)",
        "%a.3 = f32[100]{0} add(f32[100]{0} %p.1, f32[100]{0} %q.2)",
    )
    assert census.live(program) == Live(800, 0, 0)


def test_what_frees_more_than_it_makes_runs_at_once() -> None:
    """Three gradients are reduced as they come, though the text lists the reductions last."""
    lines = ["%p.1 = f32[100]{0} parameter(0)", "%z.2 = f32[] constant(0)"]
    big = "f32[50,100]{1,0}"
    lines += [f"%g.{k} = {big} dot(f32[100]{{0}} %p.1, f32[100]{{0}} %p.1)" for k in (3, 4, 5)]
    lines += [f"%r.{k + 3} = f32[] reduce({big} %g.{k}, f32[] %z.2)" for k in (3, 4, 5)]
    lines += ["%t.9 = (f32[], f32[], f32[]) tuple(f32[] %r.6, f32[] %r.7, f32[] %r.8)"]
    assert census.live(entry(*lines)).between_bytes < 2 * 50 * 100 * 4


def test_the_last_of_two_users_runs_at_once() -> None:
    """Each gradient makes the next, and is reduced, which the text does last."""
    lines = ["%p.1 = f32[100]{0} parameter(0)", "%z.2 = f32[] constant(0)"]
    big = "f32[50,100]{1,0}"
    lines += [f"%g.3 = {big} dot(f32[100]{{0}} %p.1, f32[100]{{0}} %p.1)"]
    lines += [f"%g.{k} = {big} dot({big} %g.{k - 1}, f32[100]{{0}} %p.1)" for k in (4, 5, 6)]
    lines += [f"%r.{k + 4} = f32[] reduce({big} %g.{k}, f32[] %z.2)" for k in (3, 4, 5, 6)]
    lines += ["%c.11 = f32[4]{0} concatenate(%r.7, %r.8, %r.9, %r.10)"]
    assert census.live(entry(*lines)).between_bytes < 3 * 50 * 100 * 4


def test_remarks_name_the_first_line() -> None:
    program = entry(
        '%p.1 = s64[4]{0} parameter(0), metadata={source_file="/a/b.py" source_line=1}',
        "%p.2 = s64[] parameter(1)",
        "%f.3 = f64[] constant(0.5)",
        '%f.4 = f64[] constant(0.5), metadata={source_file="/a/b.py" source_line=2}',
        '%d.5 = f32[<=4]{0} custom-call(s64[4]{0} %p.1), metadata={source_file="/a/b.py" source_line=3}',  # noqa: E501
        "%e.6 = f32[0]{0} slice(f32[<=4]{0} %d.5)",
    )
    found = [(each.fatal, each.count, each.source) for each in census.remarks(program)]
    assert found == [(True, 2, "/a/b.py:2"), (True, 1, "/a/b.py:3"), (False, 1, "/a/b.py:1"),
                     (False, 1, "")]  # fmt: skip


# --- formulas and report


CONFIG = Config(
    model=ModelConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=256,
    ),
    parallel=ParallelConfig(tensor=2),
    data=DataConfig(sequence_length=32, global_batch=4, micro_batch=2),
    run=RunConfig(dtype="bfloat16"),
)


def test_collectives_by_hand() -> None:
    one = 2 * 32 * 64 * 2 // 2  # a whole activation's half
    loss = Traffic("all-reduce", "tp", 2, 2 * 32 * 3 * 4)
    assert formulas.microstep(CONFIG, Mesh(tp=2), 1) == [
        Traffic("all-gather", "tp", 14, 14 * one),
        Traffic("reduce-scatter", "tp", 10, 10 * one),
        loss,
    ]
    assert formulas.microstep(CONFIG, Mesh(tp=1, dp=2), 1) == []
    *rest, scalars = formulas.forward(CONFIG, Mesh(tp=2, dp=2), 1)
    assert rest == [
        Traffic("all-gather", "tp", 5, 5 * one),
        Traffic("reduce-scatter", "tp", 5, 5 * one),
        loss,
    ]
    assert scalars == Traffic("all-reduce", "world", 1, 2 * 8 * 3 // 4)


def test_collectives_of_an_update_by_hand() -> None:
    groups = [GroupShape(1000, 2, 3, False, 40, 2), GroupShape(20, 2, 1, True, 0, 0)]
    world = Traffic("all-reduce", "world", 2, 2 * 16 * 3 // 4)
    assert formulas.update(Mesh(tp=2, dp=2), groups, True, 2) == [
        Traffic("reduce-scatter", "data", 4, 2 * 1020),
        Traffic("all-gather", "data", 4, 1020),
        Traffic("all-reduce", "tp", 1, 4 * 10),
        Traffic("all-reduce", "kv", 2, 4 * 40),
        world,
    ]
    whole, *_ = formulas.update(Mesh(tp=2, dp=2), groups, False, 2)
    assert whole == Traffic("all-reduce", "data", 4, 4 * 1020)
    assert formulas.update(Mesh(), groups[:0], True, 1) == []


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
