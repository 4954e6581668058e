"""Heartbeats: silent, dead and departed ranks are named."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamax.parallel.mesh import Mesh
from llamax.runtime import process
from llamax.runtime.errors import CheckpointError, ConfigError, LostRank, Stopped
from llamax.training import heartbeat
from llamax.training.heartbeat import Beat, Heartbeat, beating

# --- heartbeats ----------------------------------------------------------------------------------


def hearts(folder: Path, ranks: int, timeout_s: float = 4.0) -> list[Heartbeat]:
    found = [Heartbeat(folder, rank, ranks, timeout_s) for rank in range(ranks)]
    for heart in found:
        heart.start()
    return found


@pytest.fixture(autouse=True)
def _no_heartbeat_outlives_its_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """It would end this process when those that it watches are gone."""
    started: list[Heartbeat] = []
    start = Heartbeat.start

    def noted(heart: Heartbeat) -> None:
        started.append(heart)
        start(heart)

    monkeypatch.setattr(Heartbeat, "start", noted)
    yield
    for heart in started:
        heart._stop.set()
        heart._thread.join()


def let_beat(monkeypatch: pytest.MonkeyPatch, *living: Heartbeat) -> None:
    """While a rank looks at the others, it waits for a beat of these, however busy the machine."""

    def pause(seconds: float) -> None:
        before = {heart: heart.me.beat for heart in living}
        while any(heart.me.beat == beat for heart, beat in before.items()):
            time.sleep(0.01)

    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(sleep=pause))


def test_the_silent_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third, fourth = hearts(tmp_path, 4)
    let_beat(monkeypatch, third, fourth)
    second.at(17)
    second._stop.set()  # its thread ends, as a frozen process' would; the process lives
    assert first.silent() == "rank 1 (last step 17) fell silent"
    third.stop("out of memory")
    assert first.silent() == "rank 2 (last step 0) ended: out of memory"
    fourth.stop("out of memory")
    assert first.silent() == "rank 2 (last step 0) ended: out of memory"
    first.stop(heartbeat.DONE)


@pytest.mark.timeout(300)  # the heartbeat's is 600 s, which nobody may wait for
def test_a_dead_rank_is_named_at_once(tmp_path: Path) -> None:
    first, _ = hearts(tmp_path, 2, timeout_s=600.0)
    child = os.fork()
    if child == 0:
        signal.pause()
    try:
        beat = Beat(step=5, host=first.me.host, pid=child)
        assert not beat.gone()
        os.kill(child, signal.SIGSTOP)
        while not beat.gone():
            time.sleep(0.01)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert beat.gone()
    assert not Beat(host="another machine", pid=child).gone()
    other = Heartbeat(tmp_path, 1, 2, 600.0)
    other.me = Beat(step=4, host=first.me.host, pid=child)
    other._file = os.open(tmp_path / "rank-00001", os.O_RDWR)
    other.at(5)
    assert first.silent() == "rank 1 (last step 5) died or froze"
    first.stop(heartbeat.DONE)


def test_another_process_with_the_same_id_is_not_the_one_that_wrote(tmp_path: Path) -> None:
    (heart,) = hearts(tmp_path, 1)
    me = Beat.from_json((tmp_path / "rank-00000").read_bytes())
    assert me.started > 0
    assert not me.gone()
    assert replace(me, started=me.started - 1).gone()
    heart.stop(heartbeat.DONE)


def test_without_proc_a_living_process_is_not_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS."""
    monkeypatch.setattr(process, "PROC_SELF", tmp_path / "absent")
    me = Heartbeat(tmp_path, 0, 2, 4.0).me
    assert me.started == 0
    assert not me.gone()
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert replace(me, pid=ended.pid).gone()
    assert replace(me, pid=2**62).gone()


def test_the_end_of_an_older_job_is_not_that_of_a_rank(tmp_path: Path) -> None:
    old = [Heartbeat(tmp_path, rank, 2, 4.0, "job-1") for rank in range(2)]
    old[1].start()
    old[1].stop("out of memory")
    first = Heartbeat(tmp_path, 0, 2, 4.0, "job-2")
    first.start()
    assert first.silent() == "rank 1 (last step 0) fell silent"
    assert old[0].silent() == "rank 1 (last step 0) ended: out of memory"
    first.stop(heartbeat.DONE)


def test_a_file_of_another_user_is_no_heartbeat(tmp_path: Path) -> None:
    first, second = hearts(tmp_path, 2)
    second.at(5)
    assert first._read(1).step == 5
    first._owner += 1  # as if the file of rank 1 had been put there by another user
    assert first._read(1) == Beat()
    for heart in (first, second):
        heart.stop(heartbeat.DONE)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_that_another_user_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "rank-00000").write_text("{}")
    os.chown(tmp_path / "rank-00000", 12345, 12345)
    first, second = hearts(tmp_path, 2)
    second.at(3)
    assert first._read(1).step == 3
    assert (tmp_path / "rank-00000").stat().st_uid == 0
    for heart in (first, second):
        heart.stop(heartbeat.DONE)


@pytest.mark.parametrize("how", ["removed", "replaced", "a link"])
def test_a_rank_writes_a_new_file_where_its_own_is_gone(tmp_path: Path, how: str) -> None:
    first, second = hearts(tmp_path, 2)
    path, other = tmp_path / "rank-00001", tmp_path / "other"
    other.write_text("unchanged")
    path.unlink()
    if how == "replaced":
        path.write_text(json.dumps({"left": "an error", "beat": 10**6}))
    elif how == "a link":
        path.symlink_to(other)
    second.at(9)
    assert first._read(1).step == 9
    assert not path.is_symlink()
    assert other.read_text() == "unchanged"
    for heart in (first, second):
        heart.stop(heartbeat.DONE)


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 20_000, "[]", "null", '{"beat": NaN}', '{"step": 1e300}', '{"step": -1}'),
        *('{"step": true}', '{"left": 3}', '{"host": null}', '{"pid": 99999999999999999999}'),
        '{"other": 1}',
    ],
)
def test_what_is_no_heartbeat_counts_as_none(tmp_path: Path, text: str) -> None:
    heart = Heartbeat(tmp_path, 0, 2, 4.0)
    (tmp_path / "rank-00001").write_text(text)
    assert heart._read(1) == Beat()


def test_texts_of_a_heartbeat_are_safe_for_a_terminal(tmp_path: Path) -> None:
    beat = Beat.from_json(json.dumps({"left": "a\x1b[2J\n", "host": "h\x07"}).encode())
    assert (beat.left, beat.host) == (r"a\x1b[2J\x0a", r"h\x07")


def test_ranks_that_are_all_alive_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = hearts(tmp_path, 2)
    let_beat(monkeypatch, second)
    assert first.silent() == "every rank is alive, but they do not reach each other"
    (tmp_path / "rank-00001").write_text("{")
    assert first._read(1) == Beat()
    for heart in (first, second):
        heart.stop(heartbeat.DONE)


def test_the_lowest_rank_reports_what_several_ranks_find(tmp_path: Path) -> None:
    def end(rank: int, words: str) -> BaseException:
        with pytest.raises(BaseException) as caught, beating(Heartbeat(tmp_path, rank, 4, 4.0)):
            raise CheckpointError(words)
        left = json.loads((tmp_path / f"rank-{rank:05d}").read_text())["left"]
        assert left == words.partition(";")[0]
        return caught.value

    said = [end(rank, words) for rank, words in ((1, "A: 1; x"), (0, "A: 1; x"), (3, "A: 1; y"))]
    assert [type(error) for error in said] == [CheckpointError, CheckpointError, SystemExit]
    assert isinstance(said[2], SystemExit)
    assert said[2].code == 2
    assert str(end(2, "A: 2; x")) == "A: 2; x"


def test_a_lost_rank_is_named_and_the_name_passed_on(tmp_path: Path) -> None:
    other = Heartbeat(tmp_path, 1, 2, 4.0)
    other.start()
    other.stop("boom")

    def lose() -> None:
        with beating(Heartbeat(tmp_path, 0, 2, 4.0)):
            raise LostRank("gloo says no")

    with pytest.raises(LostRank, match=r"^rank 1 \(last step 0\) ended: boom: gloo says no"):
        lose()
    assert other._read(0).left == "lost rank 1 (last step 0) ended: boom"


def test_a_lost_rank_is_named_with_its_stage(tmp_path: Path) -> None:
    other = Heartbeat(tmp_path, 3, 4, 4.0)
    other.start()
    other.stop("boom")

    def lose() -> None:
        with beating(Heartbeat(tmp_path, 0, 4, 4.0, "", Mesh(pp=2, tp=2))):
            raise LostRank("gloo says no")

    with pytest.raises(LostRank, match=r"^rank 3 \(stage 1, last step 0\) ended: boom: gloo"):
        lose()


@pytest.mark.parametrize(
    ("error", "left"),
    [
        (ConfigError("a is b"), "a is b"),
        (ValueError("x"), "ValueError('x')"),
        (ConfigError("𝕩" * 999), "𝕩" * 400),
        (ConfigError("/data/\udce9/run"), "/data/\\udce9/run"),
        (Stopped("after step 3"), "done"),
        (SystemExit(75), "done"),
        (None, "done"),
    ],
)
def test_a_rank_records_why_it_leaves(
    tmp_path: Path, error: BaseException | None, left: str
) -> None:
    def leave() -> None:
        with beating(Heartbeat(tmp_path, 0, 2, 4.0)) as heart:
            heart.at(3)
            if error:
                raise error

    with pytest.raises(type(error)) if error else nullcontext():
        leave()
    found = Heartbeat(tmp_path, 1, 2, 4.0)._read(0)
    assert (found.step, found.left) == (3, left)


def test_one_rank_alone_writes_its_step_for_watch(tmp_path: Path) -> None:
    before = {*threading.enumerate()}
    with beating(Heartbeat(tmp_path / "heartbeats", 0, 1, 4.0)) as heart:
        heart.at(7)
        assert json.loads((tmp_path / "heartbeats" / "rank-00000").read_text())["step"] == 7
    assert json.loads((tmp_path / "heartbeats" / "rank-00000").read_text())["left"] == "done"
    assert {*threading.enumerate()} <= before, "its thread has ended"


WATCH = """
import sys, time
from pathlib import Path
from llamax.runtime.logging import setup_logging
from llamax.training import heartbeat
setup_logging()
heartbeat.PATIENCE_S = 0.5
heart = heartbeat.Heartbeat(Path(sys.argv[1]), 1, 2, float(sys.argv[2]))
heart.start()
time.sleep(600)
"""


def wait_for_beats(folder: Path, watch: subprocess.Popen[str], beats: int) -> None:
    """Wait until rank 1, which writes once for each reading, has written so often."""
    rank = Heartbeat(folder, 0, 2, 4.0)
    while rank._read(1).beat < beats:
        assert watch.poll() is None
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("left", "said"), [("", "silent for"), ("lost rank 3", "ended: lost rank 3"), ("done", "")]
)
def test_where_no_collective_fails_the_thread_ends_the_process(
    tmp_path: Path, left: str, said: str
) -> None:
    first = Heartbeat(tmp_path, 0, 2, 4.0)
    first.start()
    first.at(9)
    first.stop(left)
    watch = [sys.executable, "-c", WATCH, str(tmp_path), "0.5"]
    process = subprocess.Popen(watch, stderr=subprocess.PIPE, text=True)
    if said:
        assert process.wait(300) == LostRank.exit_code
        assert process.stderr is not None
        assert f"rank 0 (last step 9) {said}" in process.stderr.read()
        assert first._read(1).left.startswith("lost rank 0 (last step 9)")
    else:
        wait_for_beats(tmp_path, process, 15)  # its patience is over after 6
        process.kill()
        process.wait()


def test_heartbeats_of_an_earlier_job_end_no_process(tmp_path: Path) -> None:
    (before,) = hearts(tmp_path, 1)
    before.stop("lost rank 3")
    watch = [sys.executable, "-c", WATCH, str(tmp_path), "20"]
    process = subprocess.Popen(watch, stderr=subprocess.PIPE, text=True)
    wait_for_beats(tmp_path, process, 5)  # its patience is over after 2
    (now,) = hearts(tmp_path, 1)
    wait_for_beats(tmp_path, process, 7)
    now.stop("out of memory")
    assert process.wait(300) == LostRank.exit_code
    assert process.stderr is not None
    assert "rank 0 (last step 0) ended: out of memory" in process.stderr.read()


def test_a_disk_that_is_full_does_not_end_a_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    (heart,) = hearts(tmp_path, 1)
    logging.getLogger("llamax").propagate = True
    monkeypatch.setattr(heartbeat.os, "pwrite", full)
    heart.at(3)
    assert "cannot write" in caplog.text
    heart.stop(heartbeat.DONE)
