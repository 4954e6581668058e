"""The schedules of a pipeline, simulated for any number of stages, chunks and microbatches.

No stage waits for ever, each microbatch goes once through each stage and chunk each way, nothing is
used before it has arrived, the microbatches in flight stay within their bound, and the time is that
of 1F1B, interleaved or not, or of GPipe; schedules with a defect are found out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamax.config.rules.pipeline import evenly
from llamax.parallel.pipeline import (
    Micro,
    Schedule,
    Swap,
    Work,
    forwards,
    gpipe,
    holds,
    in_flight,
    layers_of,
    schedule,
)

FORWARD, BACKWARD = 1, 3
WEIGHTS = 1  # of BACKWARD, where they are put off


@dataclass
class Stage:
    """What a stage has at hand, where it stands in its schedule, and the time."""

    works: Schedule
    at: int = 0
    clock: int = 0
    arrives: int = 0  # when the last swap has arrived
    have: set[tuple[str, Micro]] = field(default_factory=set)
    flying: set[Micro] = field(default_factory=set)
    put_off: set[Micro] = field(default_factory=set)
    most: int = 0
    done: list[Work] = field(default_factory=list)

    @property
    def next(self) -> Work | Swap | None:
        return self.works[self.at] if self.at < len(self.works) else None


def simulate(works: list[Schedule], chunks: int = 1, split: bool = False) -> list[Stage]:
    """The stages after all work; AssertionError where a law is broken.

    ``split``: on all stages but the first gradients of weights are put off.
    """
    stages = [Stage(each) for each in works]
    last = len(stages) - 1
    while any(stage.next for stage in stages):
        moved = False
        for number, stage in enumerate(stages):
            while isinstance(work := stage.next, Work):
                micro = work.micro
                if work.kind != "weights":
                    stage.clock = max(stage.clock, stage.arrives)
                if work.kind == "forward":
                    starts = (number, micro.chunk) == (0, 0)
                    assert starts or ("x", micro) in stage.have, f"no input: {work}"
                    stage.flying.add(micro)
                    above = Micro(micro.number, micro.chunk + (number == last))
                    stage.have.add(("y", above))
                    stage.clock += FORWARD
                elif work.kind == "weights":
                    stage.put_off.remove(micro)
                    stage.clock += WEIGHTS
                else:
                    ends = (number, micro.chunk) == (last, chunks - 1)
                    assert ends or ("dy", micro) in stage.have, f"no dy: {work}"
                    stage.flying.remove(micro)
                    below = Micro(micro.number, micro.chunk - (number == 0))
                    stage.have.add(("dx", below))
                    stage.clock += BACKWARD
                    if split and number:
                        stage.clock -= WEIGHTS
                        stage.put_off.add(micro)
                stage.most = max(stage.most, len(stage.flying | stage.put_off))
                stage.done.append(work)
                stage.at, moved = stage.at + 1, True
        for edge in range(last + 1):
            lower, upper = stages[edge], stages[(edge + 1) % len(stages)]
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
            for stage in (lower, upper):
                stage.clock = max(stage.clock, stage.arrives)
            lower.arrives, upper.arrives = upper.clock, lower.clock
            lower.at, upper.at, moved = lower.at + 1, upper.at + 1, True
        assert moved, "deadlock"
    for stage in stages:
        stage.clock = max(stage.clock, stage.arrives)
    return stages


stages_and_micros = st.tuples(st.integers(1, 9), st.integers(1, 24))
chunked = st.tuples(st.integers(2, 8), st.integers(1, 24), st.integers(2, 4))


def both_ways(micros: int, chunks: int = 1) -> list[Work]:
    kinds: list[str] = ["backward", "forward"]
    return [
        Work(kind, Micro(micro, chunk))  # type: ignore[arg-type]
        for kind in kinds
        for micro in range(micros)
        for chunk in range(chunks)
    ]


@given(stages_and_micros)
def test_training_goes_through_all_stages_both_ways(case: tuple[int, int]) -> None:
    count, micros = case
    stages = simulate([schedule(stage, count, micros) for stage in range(count)])
    for number, stage in enumerate(stages):
        assert sorted(stage.done) == both_ways(micros)
        assert not stage.flying
        assert stage.most == in_flight(number, count, micros)
    assert max(stage.clock for stage in stages) == (micros + count - 1) * (FORWARD + BACKWARD)


@given(stages_and_micros)
def test_gradients_of_weights_fill_the_wait(case: tuple[int, int]) -> None:
    count, micros = case
    works = [schedule(stage, count, micros, split=True) for stage in range(count)]
    stages, plain = simulate(works, split=True), (micros + count - 1) * (FORWARD + BACKWARD)
    for number, stage in enumerate(stages):
        late = [Work("weights", Micro(micro)) for micro in range(micros)]
        assert sorted(stage.done) == both_ways(micros) + late * (number > 0)
        assert not stage.flying | stage.put_off
        assert stage.most == in_flight(number, count, micros, split=True)
    time = max(stage.clock for stage in stages)
    assert time <= plain
    if micros >= count:  # ZB-H1: all but the last microbatch's are put off into the wait
        assert time == plain - 2 * (count - 1) * WEIGHTS


@given(chunked)
def test_interleaved_training_goes_through_all_chunks_both_ways(case: tuple[int, int, int]) -> None:
    count, micros, chunks = case
    works = [schedule(stage, count, micros, chunks) for stage in range(count)]
    stages = simulate(works, chunks)
    for number, stage in enumerate(stages):
        assert sorted(stage.done) == both_ways(micros, chunks)
        assert not stage.flying
        bound = in_flight(number, count, micros, chunks)
        assert stage.most <= bound
        if micros % count == 0:
            assert stage.most == bound
    if micros % count == 0:  # the wait of 1F1B, in which a whole stage would cost ``chunks`` times
        rounds = micros * chunks + count - 1
        assert max(stage.clock for stage in stages) == rounds * (FORWARD + BACKWARD)


@given(stages_and_micros, st.integers(1, 3))
def test_gpipe_goes_forward_before_it_goes_back(case: tuple[int, int], chunks: int) -> None:
    count, micros = case
    chunks = chunks if count > 1 else 1
    works = [gpipe(stage, count, micros, chunks) for stage in range(count)]
    stages = simulate(works, chunks)
    for stage in stages:
        assert sorted(stage.done) == both_ways(micros, chunks)
        kinds = [work.kind for work in stage.done]
        assert kinds == ["forward"] * (micros * chunks) + ["backward"] * (micros * chunks)
    if micros % count == 0:
        rounds = micros * chunks + count - 1
        assert max(stage.clock for stage in stages) == rounds * (FORWARD + BACKWARD)


@given(stages_and_micros, st.integers(1, 3))
def test_validation_goes_through_all_stages_once(case: tuple[int, int], chunks: int) -> None:
    count, micros = case
    chunks = chunks if count > 1 else 1
    works = [forwards(stage, count, micros, chunks) for stage in range(count)]
    for stage in simulate(works, chunks):
        assert sorted(stage.done) == both_ways(micros, chunks)[micros * chunks :]
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
            assert [s.up.number for s in swaps if s.up is not None] == [*range(micros)]
            assert [s.down.number for s in swaps if s.down is not None] == [*range(micros)]


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
    works[0].insert(0, works[0].pop(works[0].index(Work("backward", Micro(0)))))
    return works


def other_chunk() -> list[Schedule]:
    """The last stage sends to the chunk that it computed, in place of the next."""
    works = [schedule(stage, 2, 4, 2) for stage in range(2)]
    for each in works:
        for place, work in enumerate(each):
            if isinstance(work, Swap) and work.edge == 1 and work.up:
                each[place] = work._replace(up=Micro(work.up.number, work.up.chunk - 1))
    return works


def group_of_chunks(make: Callable[..., Schedule]) -> list[Schedule]:
    """One stage takes the microbatches of a group in another order."""
    works = [make(stage, 2, 4, 2) for stage in range(2)]
    places = [place for place, work in enumerate(works[0]) if isinstance(work, Work)]
    a, b = places[:2]
    works[0][a], works[0][b] = works[0][b], works[0][a]
    return works


@pytest.mark.parametrize(
    ("works", "chunks"),
    [
        (exchanged(), 1),
        (one_missing(Swap), 1),
        (one_missing(Work), 1),
        (too_early(), 1),
        (other_chunk(), 2),
        (group_of_chunks(schedule), 2),
        (group_of_chunks(gpipe), 2),
    ],
    ids=[
        "swaps exchanged on one stage",
        "a swap missing",
        "a forward missing",
        "too early",
        "sent to the chunk before",
        "microbatches exchanged on one stage",
        "exchanged in GPipe",
    ],
)
def test_a_defect_of_a_schedule_is_caught(works: list[Schedule], chunks: int) -> None:
    with pytest.raises((AssertionError, KeyError)):
        simulate(works, chunks)


@given(st.integers(1, 24), st.data())
def test_every_parameter_is_on_one_stage(layers: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, layers))
    chunks = data.draw(st.integers(1, layers // stages)) if stages > 1 else 1
    counts = evenly(layers, stages * chunks)
    assert max(counts) - min(counts) <= 1
    held = [layers_of(stage, stages, counts) for stage in range(stages)]
    in_order = [each[chunk] for chunk in range(chunks) for each in held]
    assert [layer for each in in_order for layer in each] == [*range(layers)]
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(layers)]
    for name in (*names, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert [holds(each, layers, False, name) for each in held].count(True) == 1
    last = [holds(each, layers, False, "model.layers.99.x") for each in held].index(True)
    assert last == stages - 1
    assert holds(held[0], layers, False, "model.embed_tokens.weight")
    assert holds(held[-1], layers, False, "lm_head.weight")
    both = [holds(each, layers, True, "model.embed_tokens.weight") for each in held]
    assert both == [stage in (0, stages - 1) for stage in range(stages)], "tied to the head"
