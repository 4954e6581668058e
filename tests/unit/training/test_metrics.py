"""Records of a step, their log and its views."""

from __future__ import annotations

import logging
import re
import resource
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.records import RECORD, steps

from llamax.runtime.errors import DataError
from llamax.training.metrics import (
    JsonlWriter,
    Record,
    read_jsonl,
    tagged,
)


@given(st.floats(allow_nan=False), st.floats(allow_nan=False), st.none() | st.floats(0, 9))
def test_a_record_keeps_every_bit(loss: float, norm: float, validation: float | None) -> None:
    record = replace(RECORD, loss=loss, grad_norm=norm, validation_loss=validation)
    text = record.to_json()
    assert Record.from_json(text) == record
    assert "\n" not in text
    assert ("validation_loss" in text) == (validation is not None)


def test_the_samples_of_a_skipped_step() -> None:
    skipped = replace(RECORD, skipped_samples=[3, 0, 2**40])
    assert Record.from_json(skipped.to_json()) == skipped
    assert "skipped_samples" not in RECORD.to_json()
    assert (tagged(skipped)["skipped"], "skipped" in tagged(RECORD)) == (1.0, False)
    for samples in ("[0.5]", "[-1]", "7", "[[1]]"):
        with pytest.raises(ValueError, match="skipped_samples is not a list of sample ids"):
            Record.from_json(skipped.to_json().replace("[3, 0, 1099511627776]", samples))


def test_numbers_of_a_programs_own() -> None:
    own = replace(RECORD, metrics={"accuracy": 0.25, "loss": 7.0})
    assert Record.from_json(own.to_json()) == own
    assert "metrics" not in RECORD.to_json()
    assert tagged(own) == {**tagged(RECORD), "accuracy": 0.25}, "no name of llamax's is taken"
    for metrics in ("[0.5]", '{"accuracy": "0.25"}', "null", '{"accuracy": {}}'):
        with pytest.raises(ValueError, match="metrics are not numbers by name"):
            Record.from_json(own.to_json().replace('{"accuracy": 0.25, "loss": 7.0}', metrics))


def test_the_log_holds_each_step_once_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    first = JsonlWriter(path)
    for step in (1, 2, 3, 4):
        first.write(replace(RECORD, step=step, loss=float(step)))
        assert steps(path)[-1] == step  # on disk at once
    with path.open("a") as torn:
        torn.write('{"step": 5, "los')  # the machine stopped here
    first.close()

    second = JsonlWriter(path, resumed_step=2)
    assert steps(path) == [1, 2]
    second.write(replace(RECORD, step=3, loss=30.0))
    second.close()
    assert steps(path) == [1, 2, 3]
    assert [record.loss for record in read_jsonl(path)] == [1.0, 2.0, 30.0]
    assert list(path.parent.iterdir()) == [path]

    path.write_text(f"{replace(RECORD, step=0).to_json()}\n")
    JsonlWriter(path).close()  # a run from the start, which reports step 0 again
    assert steps(path) == []


def test_a_run_from_the_start_keeps_the_earlier_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("llamax").setLevel(logging.INFO)
    logging.getLogger("llamax").propagate = True
    path, texts = tmp_path / "metrics.jsonl", []
    for start in (1, 2, 3):
        log = JsonlWriter(path)
        assert log.went_back == (start > 1)
        assert steps(path) == []
        log.write(replace(RECORD, step=start))
        log.close()
        texts.append(path.read_text())
    names = ("metrics.jsonl.past", "metrics.jsonl.past-2", "metrics.jsonl")
    assert [(tmp_path / name).read_text() for name in names] == texts
    assert f"the earlier records are kept in {path}.past-2" in caplog.text
    assert len(list(tmp_path.iterdir())) == 3


def test_the_log_knows_what_it_kept_and_whether_the_run_went_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert not JsonlWriter(path).went_back
    path.write_text("".join(f"{replace(RECORD, step=step).to_json()}\n" for step in (1, 2, 3)))
    log = JsonlWriter(path, resumed_step=3)
    assert ([record.step for record in log.kept], log.went_back) == ([1, 2, 3], False)
    log = JsonlWriter(path, resumed_step=2)
    assert ([record.step for record in log.kept], log.went_back) == ([1, 2], True)
    assert sorted(tmp_path.iterdir()) == [path]


def test_records_wait_for_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Under a limit on the file's size, as a full disk: a part of a line is written, then none."""
    logging.getLogger("llamax").propagate = True
    path = tmp_path / "metrics.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = JsonlWriter(path)
    writer.write(replace(RECORD, step=1))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
        for step in (2, 3):
            writer.write(replace(RECORD, step=step))
        assert "metrics.jsonl: File too large; records wait" in caplog.text
        assert len({record.created for record in caplog.records}) == 1, "told once"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [record.step for record in read_jsonl(path)] == [1]
    writer.write(replace(RECORD, step=4))
    writer.close()
    assert steps(path) == [1, 2, 3, 4]


TEXT = RECORD.to_json().replace("1", '"1"', 1)


NULL = re.sub('"seconds": [0-9.e+-]+', '"seconds": null', RECORD.to_json())


@pytest.mark.parametrize("line", ["nonsense", "[1]", "3", '{"step": 1}', '{"foo": 1}', TEXT, NULL])
def test_a_log_with_a_strange_line_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{RECORD.to_json()}\n{line}\n{RECORD.to_json()}\n")
    with pytest.raises(DataError, match=r"metrics.jsonl:2: not a record; remove this line"):
        read_jsonl(path)
    path.write_text(f"{RECORD.to_json()}\n{line}")
    assert read_jsonl(path) == [RECORD]
    assert read_jsonl(tmp_path / "none") == []
