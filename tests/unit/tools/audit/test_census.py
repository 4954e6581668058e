"""FLOPs, live bytes and collectives of HLO text."""

from __future__ import annotations

from support.hlo_text import MATMUL, program_of

from llamax.tools.audit import census, hlo
from llamax.tools.audit.census import Live, Traffic
from llamax.tools.audit.hlo import Shape

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


def test_collectives_by_axis_with_the_bytes_of_rings() -> None:
    part = 4 * 6 * 2
    assert census.collectives(hlo.read(COLLECTIVES), AXES) == [
        Traffic("all-gather", "tp", 1, part),
        Traffic("reduce-scatter", "tp", 1, part),
        Traffic("all-reduce", "data", 1, part),
        Traffic("collective-permute", "tp", 1, part),
        Traffic("all-to-all", "world", 1, part * 3 // 4),
    ]
    crossed = COLLECTIVES.replace("{0,1},{1,0},{2,3},{3,2}", "{0,3},{3,0},{1,2},{2,1}")
    found = census.collectives(hlo.read(crossed), AXES)
    assert found[3] == Traffic("collective-permute", "other", 1, part), "no shift around an axis"


def test_flops() -> None:
    work = census.work(hlo.read(MATMUL))
    assert work.matmul_flops == 2 * 8 * 2 * 4
    assert work.other_flops == 8 * 4
    assert work.matmul_share == 128 / 160
    assert census.Work(0, 0).matmul_share == 0.0


def test_live_bytes_of_a_chain() -> None:
    """a and b overlap; c takes a's place; the element-wise step between is fused."""
    n = 4 * 100
    program = program_of(
        "%p.1 = f32[100]{0} parameter(0)",
        "%a.2 = f32[10,100]{1,0} dot(f32[100]{0} %p.1, f32[100]{0} %p.1)",
        "%e.3 = f32[10,100]{1,0} exponential(f32[10,100]{1,0} %a.2)",
        "%b.4 = f32[20,100]{1,0} dot(f32[10,100]{1,0} %e.3, f32[100]{0} %p.1)",
        "%c.5 = f32[5,100]{1,0} dot(f32[20,100]{1,0} %b.4, f32[100]{0} %p.1)",
        "%d.6 = f32[7]{0} reduce(f32[5,100]{1,0} %c.5, f32[100]{0} %p.1)",
    )
    assert census.live(program) == Live(n, 7 * 4, 30 * n - 7 * 4)


def test_an_input_lends_its_memory_to_an_output_of_its_shape() -> None:
    program = program_of(
        "%p.1 = f32[100]{0} parameter(0)",
        "%q.2 = f32[100]{0} parameter(1)",
        "%a.3 = f32[100]{0} add(f32[100]{0} %p.1, f32[100]{0} %q.2)",
    )
    assert census.live(program) == Live(800, 0, 0)


def test_an_instruction_that_frees_more_than_it_allocates_runs_at_once() -> None:
    """Three gradients are reduced as they come, though the text lists the reductions last."""
    lines = ["%p.1 = f32[100]{0} parameter(0)", "%z.2 = f32[] constant(0)"]
    big = "f32[50,100]{1,0}"
    lines += [f"%g.{k} = {big} dot(f32[100]{{0}} %p.1, f32[100]{{0}} %p.1)" for k in (3, 4, 5)]
    lines += [f"%r.{k + 3} = f32[] reduce({big} %g.{k}, f32[] %z.2)" for k in (3, 4, 5)]
    lines += ["%t.9 = (f32[], f32[], f32[]) tuple(f32[] %r.6, f32[] %r.7, f32[] %r.8)"]
    assert census.live(program_of(*lines)).between_bytes < 2 * 50 * 100 * 4


def test_the_last_of_two_users_runs_at_once() -> None:
    """Each gradient makes the next, and is reduced, which the text does last."""
    lines = ["%p.1 = f32[100]{0} parameter(0)", "%z.2 = f32[] constant(0)"]
    big = "f32[50,100]{1,0}"
    lines += [f"%g.3 = {big} dot(f32[100]{{0}} %p.1, f32[100]{{0}} %p.1)"]
    lines += [f"%g.{k} = {big} dot({big} %g.{k - 1}, f32[100]{{0}} %p.1)" for k in (4, 5, 6)]
    lines += [f"%r.{k + 4} = f32[] reduce({big} %g.{k}, f32[] %z.2)" for k in (3, 4, 5, 6)]
    lines += ["%c.11 = f32[4]{0} concatenate(%r.7, %r.8, %r.9, %r.10)"]
    assert census.live(program_of(*lines)).between_bytes < 3 * 50 * 100 * 4


def test_what_no_result_needs_is_left_out() -> None:
    """%dead would come first, with all that it needs, and %b lie there while %x is made."""
    program = program_of(
        "  %p = f32[64]{0} parameter(0)",
        "  %a = f32[64]{0} all-gather(f32[64]{0} %p), replica_groups={{0}}",
        "  %token = f32[] gather(f32[64]{0} %a)",
        "  %after = f32[64]{0} add(f32[64]{0} %p, f32[] %token)",
        "  %b = f32[64]{0} all-gather(f32[64]{0} %after), replica_groups={{0}}",
        "  %dead = f32[] gather(f32[64]{0} %b)",
        "  %x = f32[128]{0} dot(f32[64]{0} %a, f32[64]{0} %p)",
        "  %y = f32[64]{0} dot(f32[64]{0} %b, f32[128]{0} %x)",
        "%t = (f32[64]{0}) tuple(f32[64]{0} %y)",
    )
    a, b, x, token = 256, 256, 512, 4
    assert census.live(program).between_bytes == max(a + x, x + token + b)


def test_an_output_that_replaces_a_released_tensor_adds_nothing() -> None:
    """The update reads a master, and makes a new weight and a cleared gradient."""
    program = program_of(
        "%master.1 = f32[60]{0} parameter(0)",
        "%gradient.2 = f32[6,10]{1,0} parameter(1)",
        "%zero.3 = f32[] constant(0)",
        "%flat.4 = f32[60]{0} reshape(f32[6,10]{1,0} %gradient.2)",
        "%new.5 = f32[60]{0} dot(f32[60]{0} %master.1, f32[60]{0} %flat.4)",
        "%narrow.6 = bf16[60]{0} convert(f32[60]{0} %new.5)",
        "%weight.7 = bf16[6,10]{1,0} reshape(bf16[60]{0} %narrow.6)",
        "%cleared.8 = f32[6,10]{1,0} broadcast(f32[] %zero.3), dimensions={}",
        "%all.9 = (f32[60]{0}, bf16[6,10]{1,0}, f32[6,10]{1,0}) "
        "tuple(f32[60]{0} %new.5, bf16[6,10]{1,0} %weight.7, f32[6,10]{1,0} %cleared.8)",
    )
    alone = census.live(program)
    assert alone == Live(480, 120, 0)
    assert alone.added_bytes == 120
    beside = census.live(program, [Shape("bf16", (6, 10)), Shape("bf16", (3,))])
    assert beside == Live(480, 120, 0, 120)
    assert beside.added_bytes == 0
