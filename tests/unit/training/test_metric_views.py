"""TensorBoard, W&B and trackio show each step once, whatever happened to the run."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from support.records import RECORD

from llamax.config.load import load_config
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import BackendError
from llamax.train import train
from llamax.training.metrics import (
    JsonlWriter,
    Record,
    TensorBoardWriter,
    WandbWriter,
    check_installed,
    tagged,
)


def test_what_is_not_known_is_not_written() -> None:
    unknown = replace(RECORD, mfu=0.0)
    assert "mfu" not in json.loads(unknown.to_json())
    assert "mfu" not in tagged(unknown)
    assert Record.from_json(unknown.to_json()) == unknown
    assert json.loads(RECORD.to_json())["mfu"] == tagged(RECORD)["mfu"] == 0.375


def test_tensorboard_has_the_tags_of_other_trainers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoardWriter(tmp_path)
    board.write(RECORD)
    board.write(replace(RECORD, step=8, loss=2.0, validation_loss=2.5))
    board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss",
        "reduced_train_loss",
        "grad_norm",
        "throughput",
        "lr",
        "mfu",
        "consumed_tokens",
        "validation_loss",
    }
    for tag in ("loss", "reduced_train_loss"):
        assert [(e.step, e.value) for e in events.Scalars(tag)] == [(7, 2.25), (8, 2.0)]
    assert [e.value for e in events.Scalars("lr")] == pytest.approx([3e-4, 3e-4])
    assert [(e.step, e.value) for e in events.Scalars("validation_loss")] == [(8, 2.5)]
    assert events.Scalars("throughput")[0].value == 8192.0
    assert events.Scalars("consumed_tokens")[0].value == 28672.0
    assert events.Scalars("grad_norm")[0].value == 1.5
    assert events.Scalars("mfu")[0].value == 0.375


def test_tensorboard_shows_each_step_once_after_kills(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator

    shown: dict[int, float] = {}
    old, new = (
        module.EventAccumulator(str(tmp_path))
        for module in (event_accumulator, plugin_event_accumulator)
    )
    starts = [(0, 8), (5, 12), (10, 11), (10, 14), (0, 1)]  # the last from the start again
    for start, (resumed, last) in enumerate(starts):
        shown = {step: loss for step, loss in shown.items() if step <= resumed}
        board = TensorBoardWriter(tmp_path, resumed)
        for step in range(resumed + 1, last + 1):
            shown[step] = start + step / 64
            board.write(replace(RECORD, step=step, loss=shown[step]))
        board.events.flush()
        for path in tmp_path.glob("events.*"):  # readers take the files in the order of their names
            if not path.name.endswith(".start"):
                path.rename(tmp_path / f"events.out.tfevents.{start}.start")
        old.Reload()
        new.Reload()
        assert sorted(shown) == [*range(1, last + 1)]
        assert [(each.step, each.value) for each in old.Scalars("loss")] == [*shown.items()]
        tensors = [(each.step, each.tensor_proto.float_val[0]) for each in new.Tensors("loss")]
        assert tensors == [*shown.items()]


def history(path: Path) -> dict[int, float]:
    """Step -> loss in a W&B file: a log of LevelDB's format (32 KiB blocks) with protobuf in it."""
    from wandb.proto import wandb_internal_pb2

    raw, at, held, found = path.read_bytes(), 7, b"", {}
    while at + 7 <= len(raw):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        size, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        held += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last piece
            record, held = wandb_internal_pb2.Record.FromString(held), b""
            items = {i.key or i.nested_key[0]: i.value_json for i in record.history.item}
            if "loss" in items:
                found[int(items["_step"])] = float(items["loss"])
    return found


def test_wandb_offline_has_what_tensorboard_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for first in (1, 3):  # a run, and its resumption
        board = WandbWriter(tmp_path, "tests", "offline", {"run": {"steps": 4}})
        for step in (first, first + 1):
            board.write(replace(RECORD, step=step, loss=1 / step))
        board.close()
        wandb.teardown()  # waits until the file is written
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert {path.stem for path in files} == {f"run-{(tmp_path / 'wandb-id').read_text()}"}
    found = {step: loss for path in files for step, loss in history(path).items()}
    assert found == {1: 1.0, 2: 1 / 2, 3: 1 / 3, 4: 1 / 4}


def wandb_start(folder: Path, resumed: int, last: int, factor: float) -> None:
    """A start of a run that ends after step ``last``."""
    import wandb  # type: ignore[import-not-found, import-untyped, unused-ignore]

    log = JsonlWriter(folder / "metrics.jsonl", resumed)
    board = WandbWriter(folder, "tests", "offline", {}, log.kept, log.went_back)
    for step in range(resumed + 1, last + 1):
        for writer in (log, board):
            writer.write(replace(RECORD, step=step, loss=factor / step))
    log.close()
    board.close()
    wandb.teardown()  # waits until the file is written


def wandb_runs(folder: Path) -> list[dict[int, float]]:
    """The losses in W&B, of each id in turn; a later folder replaces an earlier one of its id."""
    ids = (folder / "wandb-id").read_text().split()
    newest = {
        path.stem.removeprefix("run-"): path
        for path in sorted(
            folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns
        )
    }
    assert set(newest) == set(ids)
    return [history(newest[each]) for each in ids]


def test_wandb_has_every_step_once_after_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb_start(tmp_path, 0, 4, 1.0)
    wandb_start(tmp_path, 4, 8, 1.0)  # stopped and resumed: the same id
    assert wandb_runs(tmp_path) == [{step: 1 / step for step in range(1, 9)}]
    wandb_start(tmp_path, 5, 9, 2.0)  # killed after step 8, its last checkpoint is of step 5
    first, second = wandb_runs(tmp_path)
    assert first == {step: 1 / step for step in range(1, 9)}
    assert second == {step: (1 if step < 6 else 2) / step for step in range(1, 10)}
    wandb_start(tmp_path, 0, 2, 3.0)  # from the start
    assert wandb_runs(tmp_path) == [first, second, {1: 3.0, 2: 1.5}]


def test_a_step_that_wandb_drops_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logging.getLogger("llamax").propagate = True
    board = WandbWriter(tmp_path, "tests", "offline", {})
    board.next_step = 8  # as of a run that another machine continued
    board.write(replace(RECORD, step=7))
    board.close()
    assert "W&B already has later steps than 7 and drops it" in caplog.text


def trackio_start(folder: Path, resumed: int, last: int, factor: float, kill: bool = False) -> None:
    """A start of a run that ends after step ``last``, in a process that may be killed there."""
    code = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from llamax.training.metrics import JsonlWriter, Record, TrackioWriter
folder, resumed, last, factor, kill = sys.argv[1:]
log = JsonlWriter(Path(folder, "metrics.jsonl"), int(resumed))
board = TrackioWriter(Path(folder), "tests", {"run": {"steps": 9}}, log.kept, log.went_back)
record = Record(0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)
for step in range(int(resumed) + 1, int(last) + 1):
    for writer in (log, board):
        writer.write(replace(record, step=step, loss=float(factor) / step))
if kill == "True":
    os.kill(os.getpid(), signal.SIGKILL)
log.close()
board.close()
"""
    words = [sys.executable, "-c", code, *map(str, (folder, resumed, last, factor, kill))]
    store = {"TRACKIO_DIR": str(folder / "store"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, env={**os.environ, **store}, capture_output=True, text=True)
    assert done.returncode == (-9 if kill else 0), done.stderr
    assert done.stdout == "", "it prints nothing"


def trackio_runs(folder: Path) -> list[list[tuple[int, float]]]:
    """(step, loss) in trackio's database, of each id in turn."""
    ids = (folder / "trackio-id").read_text().split()
    with closing(sqlite3.connect(folder / "store/tests.db")) as base:
        rows = base.execute("select run_name, step, metrics from metrics order by step").fetchall()
    return [
        [(step, json.loads(text)["loss"]) for name, step, text in rows if name.endswith(each)]
        for each in ids
    ]


def test_trackio_has_every_step_once_after_kills(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    whole = [(step, 1 / step) for step in range(1, 9)]
    trackio_start(tmp_path, 0, 4, 1.0)
    trackio_start(tmp_path, 4, 8, 1.0, kill=True)  # before it had written all
    trackio_start(tmp_path, 8, 8, 1.0)
    assert trackio_runs(tmp_path) == [whole]
    trackio_start(tmp_path, 5, 9, 2.0)  # its last checkpoint was of step 5
    second = whole[:5] + [(step, 2 / step) for step in range(6, 10)]
    assert trackio_runs(tmp_path) == [whole, second]


@pytest.mark.parametrize("setting", ["tensorboard=true", "wandb=offline", "trackio=mine"])
def test_a_missing_package_is_reported_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """Before data are opened; a folder of the package's name, as W&B makes, is not the package."""
    package = setting.partition("=")[0]
    config = load_config("demo", [f"--run.{setting}", f"--run.folder={tmp_path}"])
    monkeypatch.setitem(sys.modules, package, None)
    says = rf"^run\.{setting} needs the package {package}, which is not installed; pip install"
    with pytest.raises(BackendError, match=says):
        train(config, Rendezvous())
    monkeypatch.delitem(sys.modules, package)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / package).mkdir()
    with pytest.raises(BackendError, match=says):
        check_installed(config.run)
    check_installed(load_config("demo", ["--run.tensorboard=false"]).run)


def test_a_record_of_float16_has_a_loss_scale_in_every_view() -> None:
    record = replace(RECORD, loss_scale=32768.0, overflowed_steps=2)
    assert Record.from_json(record.to_json()) == record
    assert (tagged(record)["loss_scale"], tagged(record)["overflowed_steps"]) == (32768.0, 2)
    assert "loss_scale" not in tagged(RECORD)
    assert "loss_scale" not in RECORD.to_json()
