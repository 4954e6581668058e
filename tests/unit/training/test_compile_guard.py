"""The compile guard: silent while programs are few, one line with the cause if not."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from llamax.data.loader import Batch
from llamax.parallel.mesh import Seat
from llamax.runtime.errors import BackendError
from llamax.training.compile_guard import CompileGuard, all_programs, programs


class Counted:
    """A backend that compiled and read as often as it is told."""

    compiled = read = 0

    def compilations(self) -> int:
        return self.compiled

    def host_reads(self) -> int:
        return self.read


def batch(tokens: int) -> Batch:
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    return Batch(ids, ids, ids, None)


def run(guard: CompileGuard, counted: Counted, steps: list[dict[str, Any]]) -> None:
    for number, step in enumerate(steps, 1):
        with guard.watch(step.get("part", "training"), number):
            for _ in guard.note_shapes([batch(step.get("tokens", 8))]):
                counted.compiled += step.get("compiled", 0)
                counted.read += step.get("read", 0)


FINE = [{"compiled": 2}, {}, {"part": "validation", "compiled": 1}, {}, {"part": "validation"}]


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(logging.getLogger("llamax"), "propagate", True)
    caplog.set_level(logging.WARNING, "llamax")
    return caplog


def test_two_programs_to_train_and_one_to_validate_are_fine(warnings: Any) -> None:
    counted = Counted()
    run(CompileGuard(counted, "stop"), counted, FINE)
    assert not warnings.messages


@pytest.mark.parametrize(
    ("extra", "cause"),
    [
        ({"compiled": 1, "tokens": 7}, "a batch is ids [1, 7], labels [1, 7], positions [1, 7] af"),
        ({"compiled": 1, "read": 1}, "values are read on the host in the middle of the step"),
        ({"compiled": 1}, "a Python number or state differs between steps; llamax audit names"),
        ({"compiled": 1, "part": "validation"}, "validation compiled 1 program more"),
    ],
)
def test_one_more_program_is_reported_once_with_its_cause(
    warnings: Any, extra: dict[str, Any], cause: str
) -> None:
    counted = Counted()
    run(CompileGuard(counted, "warn"), counted, [*FINE, extra, extra])
    (message,) = warnings.messages
    assert cause in message
    assert message.startswith("step 6: ")
    counted = Counted()
    with pytest.raises(BackendError, match="compile_guard=warn goes on"):
        run(CompileGuard(counted, "stop"), counted, [*FINE, extra])


def test_too_many_programs_in_the_first_step_are_reported(warnings: Any) -> None:
    counted = Counted()
    run(CompileGuard(counted, "warn"), counted, [{"compiled": 3}])
    assert "step 1: training compiled 1 program more than" in warnings.messages[0]
    counted = Counted()
    run(CompileGuard(counted, "warn"), counted, [{"compiled": 5}])
    assert "step 1: training compiled 3 programs more than" in warnings.messages[1]


@pytest.mark.parametrize("guard", [CompileGuard(None, "stop"), CompileGuard(Counted(), "off")])
def test_nothing_to_watch(guard: CompileGuard, warnings: Any) -> None:
    run(guard, Counted(), [{"compiled": 9}])
    counted = Counted()
    run(CompileGuard(counted, "off"), counted, [{"compiled": 9}])
    assert not warnings.messages


def test_a_stage_compiles_its_passes_swaps_and_the_parts_of_an_update() -> None:
    assert programs() == {"training": 2, "validation": 1}
    assert programs(Seat(0, 2), [1, 1]) == {"training": 8, "validation": 4}
    assert programs(Seat(1, 2), [1, 1]) == {"training": 7, "validation": 4}
    assert programs(Seat(1, 3), [1, 1, 1]) == {"training": 9, "validation": 4}
    assert programs(Seat(1, 2), [1, 1], tied=True) == {"training": 9, "validation": 4}


def test_a_stage_compiles_the_passes_of_its_chunks() -> None:
    assert programs(Seat(0, 2), [1] * 4) == {"training": 4 + 2 + 5, "validation": 5}
    assert programs(Seat(1, 2), [1] * 4) == {"training": 3 + 2 + 5, "validation": 5}
    assert programs(Seat(1, 4), [1] * 8) == {"training": 2 + 2 + 5, "validation": 4}
    assert programs(Seat(2, 3), [1] * 9) == {"training": 3 + 2 + 5, "validation": 5}
    assert programs(Seat(1, 3), [1, 1, 1, 1, 2, 1]) == {"training": 4 + 2 + 5, "validation": 5}


def test_all_ranks_compile_the_programs_of_each_kind_of_stage() -> None:
    assert [all_programs(1, [8], validates) for validates in (False, True)] == [2, 3]
    assert all_programs(2, [4, 4], True) == 3 + 1 + 7 + 5
    assert all_programs(4, [2, 2, 2, 2], True) == 5 + 2 + 9 + 6
    assert all_programs(4, [2, 2, 2, 2], False) == 5 + 2 + 9
    assert all_programs(4, [2, 3, 2, 2], False) == 7 + 2 + 11
    assert all_programs(2, [1] * 4, True) == 5 + 2 + 7 + 6
    assert all_programs(4, [1] * 8, False) == 5 + 3 + 9
    assert all_programs(2, [4, 4], False, tied=True) == 3 + 1 + 7 + 2
