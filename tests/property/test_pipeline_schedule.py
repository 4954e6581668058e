"""The schedules of a pipeline, simulated for any number of stages and microbatches.

No stage waits for ever, each microbatch goes once through each stage each way, nothing is used
before it has arrived, the microbatches in flight stay within their bound, and the time is that of
1F1B; schedules with a defect are found out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamax.config.rules.pipeline import evenly
from llamax.parallel.pipeline import (
    Schedule,
    Swap,
    Work,
    forwards,
    holds,
    in_flight,
    layers_of,
    schedule,
)

FORWARD, BACKWARD = 1, 2


@dataclass
class Stage:
    """What a stage has at hand, where it stands in its schedule, and the time."""

    works: Schedule
    at: int = 0
    clock: int = 0
    have: set[tuple[str, int]] = field(default_factory=set)
    flying: set[int] = field(default_factory=set)
    most: int = 0
    done: list[Work] = field(default_factory=list)

    @property
    def next(self) -> Work | Swap | None:
        return self.works[self.at] if self.at < len(self.works) else None


def simulate(works: list[Schedule]) -> list[Stage]:
    """The stages after all work; AssertionError where a law is broken."""
    stages = [Stage(each) for each in works]
    last = len(stages) - 1
    while any(stage.next for stage in stages):
        moved = False
        for number, stage in enumerate(stages):
            while isinstance(work := stage.next, Work):
                if work.kind == "forward":
                    assert number == 0 or ("x", work.micro) in stage.have, f"no input: {work}"
                    stage.flying.add(work.micro)
                    stage.have |= {("y", work.micro)}
                    stage.clock += FORWARD
                else:
                    assert number == last or ("dy", work.micro) in stage.have, f"no dy: {work}"
                    stage.flying.remove(work.micro)
                    stage.have |= {("dx", work.micro)}
                    stage.clock += BACKWARD
                stage.most = max(stage.most, len(stage.flying))
                stage.done.append(work)
                stage.at, moved = stage.at + 1, True
        for edge in range(last):
            lower, upper = stages[edge], stages[edge + 1]
            if not isinstance(swap := lower.next, Swap) or swap.edge != edge:
                continue
            if not isinstance(other := upper.next, Swap) or other.edge != edge:
                continue
            assert swap == other, "both sides swap the same"
            for sent, arrives, micro, sender, receiver in (
                ("y", "x", swap.up, lower, upper),
                ("dx", "dy", swap.down, upper, lower),
            ):
                assert micro is None or (sent, micro) in sender.have, f"nothing to send: {swap}"
                receiver.have |= set() if micro is None else {(arrives, micro)}
            lower.clock = upper.clock = max(lower.clock, upper.clock)
            lower.at, upper.at, moved = lower.at + 1, upper.at + 1, True
        assert moved, "deadlock"
    return stages


stages_and_micros = st.tuples(st.integers(1, 9), st.integers(1, 24))


@given(stages_and_micros)
def test_training_goes_through_all_stages_both_ways(case: tuple[int, int]) -> None:
    count, micros = case
    stages = simulate([schedule(stage, count, micros) for stage in range(count)])
    for number, stage in enumerate(stages):
        both = [Work(kind, micro) for kind in ("forward", "backward") for micro in range(micros)]
        assert sorted(stage.done) == sorted(both)
        assert not stage.flying
        assert stage.most == in_flight(number, count, micros)
    assert max(stage.clock for stage in stages) == (micros + count - 1) * (FORWARD + BACKWARD)


@given(stages_and_micros)
def test_validation_goes_through_all_stages_once(case: tuple[int, int]) -> None:
    count, micros = case
    works = [forwards(stage, count, micros) for stage in range(count)]
    for stage in simulate(works):
        assert stage.done == [Work("forward", micro) for micro in range(micros)]
    assert all(work.down is None for each in works for work in each if isinstance(work, Swap))


@given(stages_and_micros)
def test_stages_swap_in_one_order_for_all_steps(case: tuple[int, int]) -> None:
    """Over each edge as many swaps as microbatches, and as many more as are on their way."""
    count, micros = case
    for edge in range(count - 1):
        for stage in (edge, edge + 1):
            swaps = [w for w in schedule(stage, count, micros)
                     if isinstance(w, Swap) and w.edge == edge]  # fmt: skip
            assert len(swaps) == micros + count - 1 - edge
            assert [s.up for s in swaps if s.up is not None] == [*range(micros)]
            assert [s.down for s in swaps if s.down is not None] == [*range(micros)]


def exchanged() -> list[Schedule]:
    works = [schedule(stage, 4, 8) for stage in range(4)]
    places = [place for place, work in enumerate(works[1]) if isinstance(work, Swap)]
    a, b = places[2:4]
    works[1][a], works[1][b] = works[1][b], works[1][a]
    return works


def one_missing(kind: type) -> list[Schedule]:
    works = [schedule(stage, 3, 4) for stage in range(3)]
    works[1].pop(next(place for place, work in enumerate(works[1]) if isinstance(work, kind)))
    return works


def too_early() -> list[Schedule]:
    works = [schedule(stage, 2, 4) for stage in range(2)]
    works[0].insert(0, works[0].pop(works[0].index(Work("backward", 0))))
    return works


@pytest.mark.parametrize(
    "works",
    [exchanged(), one_missing(Swap), one_missing(Work), too_early()],
    ids=["swaps exchanged on one stage", "a swap missing", "a forward missing", "too early"],
)
def test_a_defect_of_a_schedule_is_caught(works: list[Schedule]) -> None:
    with pytest.raises((AssertionError, KeyError)):
        simulate(works)


@given(st.integers(1, 12), st.data())
def test_every_parameter_is_on_one_stage(layers: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, layers))
    counts = evenly(layers, stages)
    assert max(counts) - min(counts) <= 1
    held = [layers_of(stage, counts) for stage in range(stages)]
    assert [layer for each in held for layer in each] == [*range(layers)]
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(layers)]
    for name in (*names, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert [holds(each, layers, name) for each in held].count(True) == 1
    assert [holds(each, layers, "model.layers.99.x") for each in held].index(True) == stages - 1
    assert holds(held[0], layers, "model.embed_tokens.weight")
    assert holds(held[-1], layers, "lm_head.weight")
