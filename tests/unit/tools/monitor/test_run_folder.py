"""The state of a run as read from its folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.run_folders import NOW, make_run, record

from llamax.tools.monitor.html_report import page
from llamax.tools.monitor.live_log import LiveLog
from llamax.tools.monitor.neuron_monitor import core_utilization
from llamax.tools.monitor.run_folder import read_run
from llamax.tools.monitor.watch import render


@pytest.mark.parametrize(
    ("done", "ranks", "silent", "left", "age", "state"),
    [
        (40, 0, -1, "", 9999, "finished"),
        (12, 0, -1, "", 5, "running"),
        (12, 0, -1, "", 129, "running"),  # five reports of ten steps of 2 s, and 30 s
        (12, 0, -1, "", 131, "dead"),
        (0, 0, -1, "", 5, "starting"),
        (12, 4, -1, "", 5, "running"),
        (12, 4, 2, "", 5, "stuck"),
        (12, 4, 2, "", 60, "dead"),  # now all are silent
        (12, 4, -1, "", -500, "running"),  # by a clock that is behind
        (12, 4, -1, "", -50_000, "dead"),  # heartbeats of tomorrow are not alive for ever
        (12, 4, -1, "done", 5, "stopped"),
        (12, 4, -1, "lost rank 3 (last step 7)", 5, "dead"),
    ],
)
def test_the_state_of_a_run(
    tmp_path: Path, done: int, ranks: int, silent: int, left: str, age: float, state: str
) -> None:
    run = read_run(make_run(tmp_path / "r", done, ranks, silent, left), NOW + age)
    assert run.state == state


@pytest.mark.parametrize(("now_there", "state"), [(4, "dead"), (2, "running"), (1, "running")])
def test_ranks_of_an_earlier_start_do_not_count(tmp_path: Path, now_there: int, state: str) -> None:
    folder = make_run(tmp_path / "r", 12, 4)
    for rank in (2, 3):
        beat = {"beat": 3, "step": 4, "host": "node0", "pid": 1, "left": "done"}
        (folder / "heartbeats" / f"rank-{rank:05d}").write_text(json.dumps(beat))
    (folder / "environment.json").write_text(json.dumps({"ranks": now_there}))
    assert read_run(folder, NOW + 5).state == state


def test_an_environment_of_words_is_not_known(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", 12, 4)
    words = {"ranks": "four", "dollars_per_hour": None, "instance": 7}
    (folder / "environment.json").write_text(json.dumps(words))
    run = read_run(folder, NOW + 5)
    assert run.dollars_per_hour == 0
    assert "spent" not in "\n".join(render(run, 100))
    assert "<td>7</td>" in page([run])


def test_device_use_comes_from_neuron_monitor(tmp_path: Path) -> None:
    def line(used: dict[str, float]) -> str:
        inner = {core: {"neuroncore_utilization": use} for core, use in used.items()}
        counters = {"neuroncore_counters": {"neuroncores_in_use": inner}}
        return json.dumps({"neuron_runtime_data": [{"pid": 1, "report": counters}]})

    folder = make_run(tmp_path / "r", 12)
    lines = [line({"0": 5.0}), line({"0": 90.0, "1": 95.0}), line({"0": 1.0})[:-9]]
    (folder / "neuron-monitor-node0.json").write_text("\n".join(lines))
    (folder / "neuron-monitor-node1.json").write_text(line({"0": 20.0}) + "\nnot json\n")
    run = read_run(folder, NOW)
    assert run.cores == {"node0:0": 0.9, "node0:1": 0.95, "node1:0": 0.2}
    text = "\n".join(render(run))
    assert "3 cores" in text
    assert "less than half of the others: node1:0 20%" in text
    assert core_utilization([]) == {}


def test_time_spent_adds_up_over_resumes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", 3)
    again = [record(4, seconds=1.0), record(5, seconds=3.5)]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(f"{each.to_json()}\n" for each in again))
    assert read_run(folder, NOW).spent_s == 6.0 + 3.5


def test_a_record_that_comes_while_one_watches_is_all_that_is_read(tmp_path: Path) -> None:
    path = make_run(tmp_path / "r", 12) / "metrics.jsonl"
    log, text = LiveLog(path), path.read_bytes()
    first, *_, last = log.read().recent
    line = text.splitlines(keepends=True)[-1]
    path.write_bytes(text.replace(b"{", b"!", 1) + line[:-9])  # what was read may change; cut
    assert log.read().last == last
    path.write_bytes(text.replace(b"{", b"!", 1) + line[:-1])  # whole, but for its end
    assert log.read().count == 13
    path.write_bytes(text.replace(b"{", b"!", 1) + line + line)
    assert [record.step for record in log.read().recent[-3:]] == [12, 12, 12]
    anew = path.with_suffix(".partial")  # as a run that is resumed writes it
    anew.write_bytes(text.replace(b'"step": 1,', b'"step": 9,', 1) + text)
    anew.replace(path)
    assert log.read().count == 24
    assert log.read().recent[0] == replace(first, step=9)


def test_the_step_is_known_before_its_report(tmp_path: Path) -> None:
    """By heartbeats, which carry the step in progress, and by where the start went on from."""
    run = read_run(make_run(tmp_path / "ranks", 0, ranks=4), NOW)
    assert run.step == 0
    for rank, step in enumerate((18, 17, 18, 18)):
        path = tmp_path / f"ranks/heartbeats/rank-{rank:05d}"
        path.write_text(json.dumps({"step": step, "host": "node"}))
    assert read_run(tmp_path / "ranks", NOW).step == 16
    resumed = make_run(tmp_path / "resumed", 0)
    (resumed / "environment.json").write_text(json.dumps({"ranks": 1, "step": 24}))
    assert read_run(resumed, NOW).step == 24
    (resumed / "environment.json").write_text(json.dumps({"ranks": 1, "step": "many"}))
    assert read_run(resumed, NOW).step == 0
    reported = make_run(tmp_path / "reported", 12, ranks=2)
    assert read_run(reported, NOW).step == 12
