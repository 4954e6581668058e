"""Links in a run folder, which others may have put there, are named and not followed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.run_folders import NOW, make_run

from llamax.checkpoint.lock import lock_folder
from llamax.cli.report import main as report
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import LinkError
from llamax.runtime.logging import log_to_file
from llamax.tools.monitor import run_folder
from llamax.training import metrics, run_metadata
from llamax.training.heartbeat import Heartbeat


def use_lock(folder: Path) -> None:
    with lock_folder(folder):
        pass


def use_log(folder: Path) -> None:
    with log_to_file(folder, "job", 0):
        pass


def beat(folder: Path) -> None:
    heart = Heartbeat(folder / "heartbeats", 0, 2, 60.0)
    heart.start()
    heart.stop("done")


def keep_metrics(folder: Path) -> None:
    metrics.JsonlWriter(folder / "metrics.jsonl").close()


def draw_curves(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    metrics.TensorBoardWriter(folder / "tensorboard").close()


def log_to_wandb(folder: Path) -> None:
    started = SimpleNamespace(step=0, finish=lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: started))
        metrics.WandbWriter(folder, "project", "offline", {}).close()


def describe(folder: Path) -> None:
    run_metadata.write(folder, Rendezvous())


WRITERS: dict[str, Callable[[Path], None]] = {
    "lock": use_lock,
    "logs": use_log,
    "logs/job": use_log,
    "logs/job/rank-00000.log": use_log,
    "heartbeats": beat,
    "heartbeats/rank-00000": beat,
    "metrics.jsonl": keep_metrics,
    ".metrics.jsonl.partial": keep_metrics,
    "environment.json": describe,
    ".environment.json.partial": describe,
    "tensorboard": draw_curves,
    "wandb": log_to_wandb,
    "wandb-id": log_to_wandb,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("points_to", ["file", "folder", "nothing"])
def test_a_run_writes_through_no_link(tmp_path: Path, name: str, points_to: str) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / points_to)
    with pytest.raises(LinkError, match=rf"{name} is a link to {tmp_path / points_to}; remove it"):
        WRITERS[name](tmp_path / "run")
    assert os.readlink(link) == str(tmp_path / points_to)
    assert (tmp_path / "file").read_text() == "precious"
    assert not list((tmp_path / "folder").iterdir())
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("name", WRITERS)
def test_without_a_link_it_writes(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    for _ in range(2):
        WRITERS[name](tmp_path / "run")
    assert (tmp_path / "run" / name.replace(".partial", "").replace("/.", "/").lstrip(".")).exists()


def test_a_report_is_written_through_no_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = make_run(tmp_path / "run", 3), tmp_path / "report.html"
    (tmp_path / "target").write_text("precious")
    out.symlink_to("target")
    with pytest.raises(LinkError, match=r"report.html is a link to target; remove it"):
        report([str(folder), "--out", str(out)])
    assert (tmp_path / "target").read_text() == "precious"
    with pytest.raises(LinkError, match=r"/dev/null is not a regular file; choose another name"):
        report([str(folder), "--out", "/dev/null"])
    out.unlink()
    for _ in range(2):
        assert report([str(folder), "--out", str(out)]) == 0
    assert "<html" in out.read_text()


@pytest.mark.timeout(300)  # a pipe would wait for its other end
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_linked_heartbeat_is_no_heartbeat(tmp_path: Path, kind: str) -> None:
    """Neither for the other ranks of the run nor for who watches it."""
    folder = make_run(tmp_path / "run", 3)
    beats, real = folder / "heartbeats", tmp_path / "elsewhere"
    beats.mkdir(exist_ok=True)
    real.write_text(json.dumps({"beat": 3, "step": 7, "host": "node", "pid": 1, "left": ""}))
    watcher = Heartbeat(beats, 0, 2, 60.0)
    os.link(real, beats / "rank-00001")
    assert watcher._read(1).step == 7
    assert [rank.beat.step for rank in run_folder.ranks(beats, NOW, 2)][-1:] == [7]
    for name in ("heartbeats/rank-00001", "environment.json", "lock"):
        (folder / name).unlink(missing_ok=True)
        if kind == "link":
            (folder / name).symlink_to(real)
        else:
            os.mkfifo(folder / name)
    assert watcher._read(1).step == 0
    seen = run_folder.read_run(folder, NOW)
    assert 1 not in [rank.number for rank in seen.ranks]
    assert (seen.environment, seen.locked) == ({}, None)


def test_a_linked_id_of_wandb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    wandb = SimpleNamespace(
        init=lambda **options: started.append(options["id"]) or SimpleNamespace(step=0)
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for _ in range(2):
        metrics.WandbWriter(tmp_path, "project", "offline", {})
    assert started == [(tmp_path / "wandb-id").read_text()] * 2
    (tmp_path / "wandb-id").rename(tmp_path / "elsewhere")
    (tmp_path / "wandb-id").symlink_to("elsewhere")
    with pytest.raises(LinkError, match="wandb-id is a link to elsewhere; remove it"):
        metrics.WandbWriter(tmp_path, "project", "offline", {})
    assert len(started) == 2
