"""What a run's folder tells from outside: its state, the terminal's view, the page, their parts."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import socket
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llamax.checkpoint import lock
from llamax.cli import report, watch
from llamax.config.load import dump_config, load_config
from llamax.parallel.rendezvous import job_id
from llamax.runtime.errors import ConfigError, DataError
from llamax.runtime.logging import log_to_file, logger, setup_logging
from llamax.tools.monitor.html_report import page, told_apart
from llamax.tools.monitor.run_folder import cores, percentiles, read_run
from llamax.tools.monitor.svg import Curve, chart, smoothed, span, thinned, ticks
from llamax.tools.monitor.watch import COLOURS, clip, render, spark
from llamax.training import run_metadata
from llamax.training.metrics import Log, Record

NOW = 1_800_000_000.0
STEPS = 40


def record(step: int, **more: float) -> Record:
    values: dict[str, float] = {"seconds": step * 2.0, "step_s": 2.0, "loss": 5.0 - step / 20}
    values |= {"grad_norm": 0.5, "lr": 1e-3, "tokens_per_s": 512.0, "mfu": 0.4} | more
    tokens = {"consumed_tokens": step * 1024, "memory_bytes": 2**30}
    return Record(step=step, **tokens, **values)  # type: ignore[arg-type]


def make(folder: Path, done: int, ranks: int = 0, silent: int = -1, left: str = "") -> Path:
    """A run's folder after ``done`` of 40 steps, written at NOW."""
    overrides = [f"--run.steps={STEPS}", f"--run.folder={folder}", "--optim.warmup_steps=2"]
    folder.mkdir(parents=True)
    text = dump_config(load_config("demo", overrides))
    (folder / "config.toml").write_text(text)
    metrics = folder / "metrics.jsonl"
    lines = [record(s, validation_loss=4.0) if s == 8 else record(s) for s in range(1, done + 1)]
    metrics.write_text("".join(f"{each.to_json()}\n" for each in lines))
    os.utime(metrics, (NOW, NOW))
    (folder / "heartbeats").mkdir()
    for rank in range(ranks):
        path = folder / "heartbeats" / f"rank-{rank:05d}"
        beat = {"beat": 3, "step": done, "host": f"node{rank // 2}", "pid": 1, "left": left}
        path.write_text(json.dumps(beat).ljust(512))
        age = 100 if rank == silent else 1
        os.utime(path, (NOW - age, NOW - age))
    step = folder / "checkpoints" / "step-00000008"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text("{}")
    (step / "done").touch()
    for other in ("step-00000016", "step-00000017.tmp", "step-00000018.past"):
        (step.parent / other).mkdir()
        (step.parent / other / "manifest.json").write_text("{}")
    (step.parent / "step-00000018.past" / "done").touch()
    told = {"ranks": 4, "dollars_per_hour": 36.0, "instance": "trn1.32xlarge"}
    (folder / "environment.json").write_text(json.dumps(told))
    return folder


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
        (12, 4, -1, "done", 5, "stopped"),
        (12, 4, -1, "lost rank 3 (last step 7)", 5, "dead"),
    ],
)
def test_the_state_of_a_run(
    tmp_path: Path, done: int, ranks: int, silent: int, left: str, age: float, state: str
) -> None:
    run = read_run(make(tmp_path / "r", done, ranks, silent, left), NOW + age)
    assert run.state == state


@pytest.mark.parametrize(("now_there", "state"), [(4, "dead"), (2, "running"), (1, "running")])
def test_ranks_of_an_earlier_start_do_not_count(tmp_path: Path, now_there: int, state: str) -> None:
    folder = make(tmp_path / "r", 12, 4)
    for rank in (2, 3):
        beat = {"beat": 3, "step": 4, "host": "node0", "pid": 1, "left": "done"}
        (folder / "heartbeats" / f"rank-{rank:05d}").write_text(json.dumps(beat))
    (folder / "environment.json").write_text(json.dumps({"ranks": now_there}))
    assert read_run(folder, NOW + 5).state == state


def test_an_environment_of_words_is_not_known(tmp_path: Path) -> None:
    folder = make(tmp_path / "r", 12, 4)
    words = {"ranks": "four", "dollars_per_hour": None, "instance": 7}
    (folder / "environment.json").write_text(json.dumps(words))
    run = read_run(folder, NOW + 5)
    assert run.dollars_per_hour == 0
    assert "spent" not in "\n".join(render(run, 100))
    assert "<td>7</td>" in page([run])


def test_a_view_says_all_that_is_known(tmp_path: Path) -> None:
    run = read_run(make(tmp_path / "night", 12, 4, 2), NOW + 5)
    text = "\n".join(render(run, 100))
    for words in (
        "night",
        "3.20M float32, tensor 2 x data 2 on cpu",
        "stuck",
        "30%",
        "step 12/40",
        "$0.24 spent, $0.56 to go",  # 24 s and 56 s at $36 an hour
        "loss             4.4000",
        "validation 4.0000, perplexity 54.6",
        "grad norm",
        "0.500",
        "128 a rank",
        "40.0%",
        f"{'step time':<13} {'2.00s':>9}",
        "median of 12 reports, p90 2.00s, p99 2.00s",
        "memory 1 GiB",
        "last report 5.00s ago",
        "3/4",
        "2  on node1, last step 12: silent for 1m45s",
        f"{'checkpoint':<13} {'8':>9}",
    ):
        assert words in text, words
    assert "\x1b" not in text
    coloured = "\n".join(render(run, 100, colour=True))
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == text
    assert f"\x1b[1;{COLOURS['red']}mstuck" in coloured


@pytest.mark.parametrize("width", [20, 40, 60, 80, 140])
def test_no_line_is_wider_than_the_terminal(tmp_path: Path, width: int) -> None:
    run = read_run(make(tmp_path / "night", 12, 4, 2), NOW + 5)
    for colour in (False, True):
        lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in render(run, width, colour, 3.6e6)]
        assert max(map(len, lines)) <= width
        assert ("$24,000.00 spent" in "\n".join(lines)) == (
            width >= 60
        )  # dollars go before steps do
        assert "step 12/40" in lines[1] or width < 40
        if width == 140:
            assert lines[0].endswith(time.strftime("%H:%M:%S", time.localtime(run.now)))
            assert len(lines[0]) == width - 2
    assert clip("\x1b[1mabcdef\x1b[0m", 4) == "\x1b[1mabc\x1b[0m…"
    assert clip("\x1b[1mabcd\x1b[0m", 4) == "\x1b[1mabcd\x1b[0m"


def test_ctrl_c_leaves_the_last_view_on_the_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(time, "sleep", interrupted)
    assert watch.main([str(make(tmp_path / "r", 12, 2))]) == 0
    screen, after = capsys.readouterr().out.split("\x1b[?1049l")
    assert screen.startswith("\x1b[?1049h")
    assert "step 12/40" in after


def test_a_running_view_says_what_is_left(tmp_path: Path) -> None:
    text = "\n".join(render(read_run(make(tmp_path / "r", 12), NOW + 5), price=3600.0))
    assert "left 56s" in text
    assert "$24.00 spent, $56.00 to go" in text
    once = "\n".join(render(read_run(make(tmp_path / "t", 1), NOW)))
    assert "median of 1 report, p90" in once
    early = "\n".join(render(read_run(make(tmp_path / "s", 0), NOW)))
    assert "no step has been reported yet" in early


def test_device_use_comes_from_neuron_monitor(tmp_path: Path) -> None:
    def line(used: dict[str, float]) -> str:
        inner = {core: {"neuroncore_utilization": use} for core, use in used.items()}
        counters = {"neuroncore_counters": {"neuroncores_in_use": inner}}
        return json.dumps({"neuron_runtime_data": [{"pid": 1, "report": counters}]})

    folder = make(tmp_path / "r", 12)
    lines = [line({"0": 5.0}), line({"0": 90.0, "1": 95.0}), line({"0": 1.0})[:-9]]
    (folder / "neuron-monitor-node0.json").write_text("\n".join(lines))
    (folder / "neuron-monitor-node1.json").write_text(line({"0": 20.0}) + "\nnot json\n")
    run = read_run(folder, NOW)
    assert run.cores == {"node0:0": 0.9, "node0:1": 0.95, "node1:0": 0.2}
    text = "\n".join(render(run))
    assert "3 cores" in text
    assert "less than half of the others: node1:0 20%" in text
    assert cores([]) == {}


def test_time_spent_adds_up_over_resumes(tmp_path: Path) -> None:
    folder = make(tmp_path / "r", 3)
    again = [record(4, seconds=1.0), record(5, seconds=3.5)]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(f"{each.to_json()}\n" for each in again))
    assert read_run(folder, NOW).spent_s == 6.0 + 3.5


def test_watch_prints_once_into_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert watch.main([str(make(tmp_path / "r", 12))]) == 0
    assert "step 12/40" in capsys.readouterr().out
    assert watch.main([str(tmp_path / "r"), "--once", "--instance", "trn1.2xlarge"]) == 0
    assert "$" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--every=0 is not above 0"):
        watch.main([str(tmp_path / "r"), "--every", "0"])
    with pytest.raises(DataError, match="is no run's folder"):
        watch.main([str(tmp_path)])


def test_sparks_and_percentiles() -> None:
    assert spark([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert spark([1, 1, 9, 9], 2) == "▁█"
    assert spark([5.0], 4) == "▁"
    assert spark([float("nan"), 1.0, 2.0], 3) == " ▁█"
    assert percentiles(range(1, 101), (1, 50, 99)) == [1, 50, 99]
    assert percentiles([3.0, 1.0], (50, 90)) == [1.0, 3.0]


# --- the page ------------------------------------------------------------------------------------


class Closed(HTMLParser):
    """Fails where a tag is not closed in order; collects what would be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("count", [1, 2])
def test_the_page_is_whole_and_loads_nothing(tmp_path: Path, count: int) -> None:
    runs = [read_run(make(tmp_path / f"a<{k}>&", 12 + k, 4), NOW + 5) for k in range(count)]
    text = page(runs)
    parsed = Closed()
    parsed.feed(text)
    assert parsed.open == []
    assert parsed.loads == []
    assert "script" not in text
    assert "a<0>" not in text
    assert "a&lt;0&gt;&amp;" in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    for words in (
        "loss, nats per token",
        "learning rate",
        "Throughput",
        "Configuration",
        "Environment",
        "trn1.32xlarge",
        "Checkpoints",
        "4.0000",
        "40.0%",
    ):
        assert words in text, words
    assert ("What differs" in text) == (count > 1)


def test_the_page_leaves_out_what_is_not_known(tmp_path: Path) -> None:
    folder = make(tmp_path / "r", 6)  # validated at step 8
    told = {"ranks": 4, "dollars_per_hour": 0.0, "instance": ""}
    (folder / "environment.json").write_text(json.dumps(told))
    text = page([read_run(folder, NOW)])
    assert "<td>ranks" in text
    for words in ("best validation", "cost", "<td>instance", "<td>dollars_per_hour"):
        assert words not in text, words
    assert "best validation" in page([read_run(make(tmp_path / "s", 9), NOW)])


def test_runs_that_differ_are_marked(tmp_path: Path) -> None:
    one, other = (make(tmp_path / name, 12) for name in "ab")
    changed = (other / "config.toml").read_text().replace("seed = 0", "seed = 7")
    (other / "config.toml").write_text(changed)
    text = page([read_run(folder, NOW) for folder in (one, other)])
    differing = text.partition("What differs")[2].partition("Configuration")[0]
    assert re.findall(r"<tr><td>([a-z._]+)", differing) == ["run.seed"]
    assert text.count("<tr class=marked>") == 1
    assert "What differs</h2><p>no setting</p>" in page([read_run(one, NOW)] * 2)


def test_runs_of_one_name_are_told_by_their_paths(tmp_path: Path) -> None:
    folders = [make(tmp_path / name, 12) for name in ("x/night", "y/night", "day")]
    found = told_apart([read_run(folder, NOW) for folder in folders])
    assert [run.name for run in found] == [str(folders[0]), str(folders[1]), "day"]


def test_a_record_that_comes_while_one_watches_is_all_that_is_read(tmp_path: Path) -> None:
    path = make(tmp_path / "r", 12) / "metrics.jsonl"
    log, text = Log(path), path.read_bytes()
    first, *_, last = log.read()
    line = text.splitlines(keepends=True)[-1]
    path.write_bytes(text.replace(b"{", b"!", 1) + line[:-9])  # what was read may change; cut
    assert log.read()[-1] == last
    path.write_bytes(text.replace(b"{", b"!", 1) + line[:-1])  # whole, but for its end
    assert len(log.read()) == 13
    path.write_bytes(text.replace(b"{", b"!", 1) + line + line)
    assert [record.step for record in log.read()[-3:]] == [12, 12, 12]
    anew = path.with_suffix(".partial")  # as a run that is resumed writes it
    anew.write_bytes(text.replace(b'"step": 1,', b'"step": 9,', 1) + text)
    anew.replace(path)
    assert len(log.read()) == 24
    assert log.read()[0] == replace(first, step=9)


def test_a_run_without_records_still_has_a_page(tmp_path: Path) -> None:
    assert "starting" in page([read_run(make(tmp_path / "r", 0), NOW)])


def test_report_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = make(tmp_path / "r", 12), tmp_path / "page.html"
    assert report.main([str(folder), "--out", str(out)]) == 0
    assert out.read_text().startswith("<!doctype html>")
    with pytest.raises(DataError, match="cannot be written"):
        report.main([str(folder), "--out", str(tmp_path / "no" / "page.html")])


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(1.93, 2.11) == pytest.approx([1.95, 2.0, 2.05, 2.1])
    assert ticks(0, 2.5e9)[1] == 5e8


def test_charts_leave_out_what_is_not_finite_and_the_wildest() -> None:
    assert chart("t", [Curve("c", [])], "x", str, str) == ""
    assert chart("t", [Curve("c", [(1, float("inf"))])], "x", str, str) == ""
    values = [*([1.0] * 198), 500.0, 900.0]
    low, high = span(values, zero=False)
    assert high < 600
    assert span([2.0, 4.0], zero=True)[0] == 0.0
    assert low < 1.0 < high


def test_curves_are_thinned_and_smoothed_without_bias() -> None:
    line = [(float(x), 3.0) for x in range(2000)]
    assert len(thinned(line)) == 400
    assert thinned(line)[-1] == (1999.0, 3.0)
    assert [y for _, y in smoothed(line[:50])] == pytest.approx([3.0] * 50)


# --- logs and environment ------------------------------------------------------------------------


def test_every_rank_keeps_its_log_and_what_ended_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging("tp3", main=False)

    def rank() -> None:
        with log_to_file(tmp_path, "job-7", 3):
            logger.info("quiet on the terminal")
            logger.warning("told")
            raise ZeroDivisionError("the end")

    with pytest.raises(ZeroDivisionError):
        rank()
    kept = (tmp_path / "logs" / "job-7" / "rank-00003.log").read_text()
    assert "INFO quiet on the terminal" in kept
    assert "ZeroDivisionError: the end" in kept
    assert capsys.readouterr().err == "llamax: [tp3] told\n"
    assert len(logger.handlers) == 1
    logger.handlers[:] = [logging.StreamHandler(io.StringIO())]


@pytest.mark.parametrize(
    ("environ", "job"),
    [
        ({}, "local"),
        ({"TORCHELASTIC_RUN_ID": "none"}, "local"),
        ({"TORCHELASTIC_RUN_ID": "a/b c"}, "a-b-c"),
        ({"SLURM_JOB_ID": "4711", "TORCHELASTIC_RUN_ID": "x"}, "4711"),
    ],
)
def test_a_job_has_the_name_its_launcher_gives(environ: dict[str, str], job: str) -> None:
    assert job_id(environ) == job


def test_the_environment_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    product = tmp_path / "product"
    product.write_text("trn1.32xlarge\n")
    monkeypatch.setattr(run_metadata, "PRODUCT", product)
    run_metadata.write(tmp_path, 128, 32, "4711")
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found["nodes"] == 4
    assert found["dollars_per_hour"] == pytest.approx(4 * 21.50)
    assert found["host"] == socket.gethostname()
    assert found["job"] == "4711"
    assert "torch" in found
    product.write_text("Standard PC")
    assert run_metadata.describe(2, 2, "x")["dollars_per_hour"] == 0.0


def test_a_lock_tells_whether_a_run_of_this_machine_lives(tmp_path: Path) -> None:
    folder = make(tmp_path / "r", 12)
    with lock.held(folder):
        assert read_run(folder, NOW + 9999).state == "running"
    assert read_run(folder, NOW + 5).state == "stopped"
    (folder / "lock").write_text("pid 1 on elsewhere since then\n")
    assert read_run(folder, NOW + 5).state == "running"
    assert read_run(folder, NOW + 9999).state == "dead"
