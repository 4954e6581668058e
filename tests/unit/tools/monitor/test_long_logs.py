"""Logs of many records: as a live view that keeps little of them, and as columns."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.run_folders import NOW, make_run, record

from llamax.runtime.errors import DataError
from llamax.tools.monitor import columns, live_log
from llamax.tools.monitor.columns import read_columns
from llamax.tools.monitor.live_log import History, LiveLog, Trend
from llamax.tools.monitor.run_folder import COLUMNS, Cache, read_run
from llamax.training.metrics import Record, read_jsonl


def write(path: Path, records: Sequence[Record]) -> None:
    path.write_text("".join(f"{each.to_json()}\n" for each in records))


def many(count: int) -> list[Record]:
    """Records of a run that was started three times.

    Some have a validation loss, no MFU, or the samples of a skipped step.
    """
    found = []
    for step in range(1, count + 1):
        more: dict[str, Any] = {"loss": 1e4 / (step + 100), "seconds": (step * 3 % count) * 2.0}
        more |= {"validation_loss": step / 7} if step % 31 == 0 else {}
        more |= {"mfu": 0.0} if step % 5 == 0 else {}
        more |= {"skipped_samples": [step, 2 * step]} if step % 37 == 0 else {}
        more |= {"metrics": {"accuracy": step / 9}} if step % 41 == 0 else {}
        found.append(record(step, **more))
    return found


@pytest.fixture
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretches of 32 KiB count as long."""
    sizes = {"LONG_BYTES": 2**15, "TAIL_BYTES": 2**14, "BLOCK_BYTES": 2**13, "SAMPLES": 64}
    for name, value in sizes.items():
        monkeypatch.setattr(live_log, name, value)
    monkeypatch.setattr(columns, "BLOCK_BYTES", 2**12)


def exact(path: Path, monkeypatch: pytest.MonkeyPatch) -> History:
    with monkeypatch.context() as whole:
        whole.setattr(live_log, "LONG_BYTES", 2**40)
        return LiveLog(path).read()


@pytest.mark.usefixtures("short_stretches")
def test_a_long_log_is_sampled_and_known_as_if_all_were_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, records = tmp_path / "metrics.jsonl", many(3000)
    write(path, records)
    sampled, whole = LiveLog(path).read(), exact(path, monkeypatch)
    assert sampled.count == whole.count == 3000
    assert sampled.recent == whole.recent == tuple(records[-50:])
    assert sampled.skipped == whole.skipped == 3000 // 37
    assert sampled.validation_loss == whole.validation_loss == 2976 / 7
    starts = [a.seconds for a, b in pairwise(records) if b.seconds < a.seconds]
    assert len(starts) == 3
    assert sampled.spent_s == whole.spent_s == sum(starts) + records[-1].seconds
    assert len(sampled.trends["loss"]) < 200
    for trends in (sampled.trends, whole.trends):
        assert trends["loss"] == sorted(trends["loss"], reverse=True)
        assert statistics.mean(trends["tokens_per_s"]) == 512.0
    assert sampled.trends["loss"][0] == pytest.approx(whole.trends["loss"][0], rel=0.3)


@pytest.mark.usefixtures("short_stretches")
@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"step": 1}', '{"seconds": 1}'])
@pytest.mark.parametrize("number", [1, 700, 1499])
def test_a_strange_line_of_a_long_log_is_named(tmp_path: Path, line: str, number: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, many(1500))
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")
    words = rf"metrics.jsonl:{number}: not a record; remove this line"
    with pytest.raises(DataError, match=words):
        read_columns(path, COLUMNS)
    if '"seconds"' not in line or number == 1499:  # a live view parses only samples
        with pytest.raises(DataError, match=words):
            LiveLog(path).read()


def test_trends_keep_little_and_follow_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_log, "MOST_VALUES", 16)
    trend = Trend()
    for value in range(1000):
        trend.add(float(value))
        assert len(trend.means) < 16
    values = trend.values()
    assert trend.per_mean == 64
    assert values[:15] == [31.5 + 64 * k for k in range(15)]
    assert values[15] == statistics.mean(range(960, 1000))
    broken = Trend()
    for value in [math.nan, math.inf, *([2.0] * 30), math.nan]:
        broken.add(value)
    assert [str(value) for value in broken.values()] == ["2.0"] * 8 + ["nan"]


@pytest.mark.usefixtures("short_stretches")
def test_columns_are_the_fields_of_the_records(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [*many(500), record(501, loss=math.nan, grad_norm=math.inf)]
    write(path, records)
    with path.open("a") as file:
        file.write('{"step": 502, "los')  # the machine stopped here
    found = read_columns(path, COLUMNS)
    assert read_jsonl(path)[:500] == records[:500]
    for name in COLUMNS:
        values = [getattr(each, name) for each in records]
        expected = [math.nan if value is None else value for value in values]
        np.testing.assert_array_equal(found[name], np.array(expected))
    assert [len(column) for column in read_columns(tmp_path / "none", ["loss"]).values()] == [0]


@pytest.mark.parametrize("written", ["largest", "with a mark", "in UTF-16"])
def test_columns_take_every_line_that_is_a_record(tmp_path: Path, written: str) -> None:
    path, each = tmp_path / "metrics.jsonl", record(1)
    text = replace(each, consumed_tokens=2**63 - 1 if written == "largest" else 5).to_json()
    encoding = {"with a mark": "utf-8-sig", "in UTF-16": "utf-16"}.get(written, "utf-8")
    path.write_text(text, encoding=encoding)
    (expected,) = read_jsonl(path)
    found = read_columns(path, COLUMNS)
    assert found["consumed_tokens"].tolist() == [float(expected.consumed_tokens)]
    assert math.isnan(found["validation_loss"][0])


def test_a_checkpoint_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "r", 12)
    measured: list[Path] = []
    rglob = Path.rglob

    def counted(path: Path, pattern: str) -> object:
        measured.append(path)
        return rglob(path, pattern)

    monkeypatch.setattr(Path, "rglob", counted)
    cache = Cache(folder)
    first, again = (read_run(folder, NOW, cache).saved for _ in range(2))
    assert first == again
    assert len(measured) == 1
    (folder / "checkpoints/step-00000008/hf").mkdir()
    (folder / "checkpoints/step-00000008/hf/model.safetensors").write_bytes(bytes(100))
    (saved,) = read_run(folder, NOW, cache).saved
    assert saved.size_bytes == first[0].size_bytes + 100
    assert len(measured) == 2


def test_a_log_written_anew_in_its_place_is_read_anew(tmp_path: Path) -> None:
    """A new file may get the inode of the one that it replaces, and be longer at once."""
    path = tmp_path / "metrics.jsonl"
    write(path, [record(step) for step in range(1, 6)])
    log = LiveLog(path)
    assert log.read().count == 5
    write(path, [record(step) for step in range(101, 141)])
    assert [each.step for each in log.read().recent] == list(range(101, 141))
    path.write_text("")
    assert log.read().count == 0


def test_a_line_that_does_not_end_is_refused_without_reading_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [record(1)])
    os.truncate(path, 2**34)  # a hole, which a crash of the machine may leave
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a record"):
        LiveLog(path).read()
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a record"):
        read_columns(path, ["step"])
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a record"):
        read_jsonl(path)


@pytest.mark.parametrize("samples", ["3", "[1.5]", "[-1]", "[true]", '["a"]', "null", "{}"])
def test_samples_that_are_none_are_no_record(tmp_path: Path, samples: str) -> None:
    path, line = tmp_path / "metrics.jsonl", record(1, skipped_samples=[7]).to_json()
    path.write_text(f"{line}\n{line.replace('[7]', samples)}\n{line}\n")
    readers = [read_jsonl, lambda path: LiveLog(path).read(), lambda p: read_columns(p, ["loss"])]
    for reader in readers:
        with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a record"):
            reader(path)


def test_metrics_that_are_no_numbers_are_no_record(tmp_path: Path) -> None:
    path, line = tmp_path / "metrics.jsonl", record(1, metrics={"accuracy": 0.5}).to_json()
    path.write_text(f"{line}\n{line.replace('0.5', '[]')}\n{line}\n")
    for reader in (read_jsonl, lambda p: LiveLog(p).read(), lambda p: read_columns(p, ["loss"])):
        with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a record"):
            reader(path)


def test_a_skipped_step_counts_before_its_line_has_an_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [record(1), record(2, skipped_samples=[])])
    path.write_text(path.read_text() + record(3, skipped_samples=[4]).to_json())
    log = LiveLog(path)
    assert log.read().skipped == 2
    with path.open("a") as file:
        file.write("\n")
    assert log.read().skipped == 2
