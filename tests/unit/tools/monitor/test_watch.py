"""The view of a run in a terminal."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

import pytest
from support.run_folders import NOW, make_run, record

from llamax.checkpoint.lock import lock_folder
from llamax.cli import watch
from llamax.runtime.errors import ConfigError, DataError
from llamax.tools.monitor.html_report import page
from llamax.tools.monitor.run_folder import percentiles, read_run
from llamax.tools.monitor.watch import COLOURS, as_json, clip, render, sparkline


def test_a_view_shows_all_that_is_known(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "night", 12, 4, 2), NOW + 5)
    text = "\n".join(render(run, 100))
    for words in (
        "night",
        "3.20M float32, tensor 2 x data 2 on cpu",
        "stuck",
        "30%",
        "step 12/40",
        "$0.24 spent, $0.56 remaining",  # 24 s and 56 s at $36 an hour
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


def test_skipped_steps_are_counted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "night", 12)
    run = read_run(folder, NOW + 5)
    assert "skipped" not in "\n".join(render(run, 100)) + page([run]).partition("Config")[0]
    assert as_json(run)["skipped_steps"] == 0
    with (folder / "metrics.jsonl").open("a") as log:
        for step in range(13, 16):
            log.write(record(step, skipped_samples=[step]).to_json() + "\n")
    run = read_run(folder, NOW + 5)
    assert f"{'skipped':<13} {'3':>9}  steps without an update" in render(run, 100)
    assert "<b>3</b><span>skipped steps</span>" in page([run])
    found = as_json(run)
    assert (found["skipped_steps"], found["last"]["skipped_samples"]) == (3, [15])


def test_context_ranks_are_no_data_ranks(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "long", 12, 4, -1, "", "--parallel.context=2")
    run = read_run(folder, NOW + 5)
    assert run.mesh == "tensor 2 x context 2 x data 1"
    assert "3.20M float32, tensor 2 x context 2 x data 1 on cpu" in render(run, 100)[0]
    assert "tensor 2 x context 2 x data 1, cpu, 4 ranks" in page([run])
    (folder / "environment.json").unlink()
    assert read_run(folder, NOW + 5).mesh == "tensor 2 x context 2", "of unknown data degree"


@pytest.mark.parametrize("width", [20, 40, 60, 80, 140])
def test_no_line_is_wider_than_the_terminal(tmp_path: Path, width: int) -> None:
    run = read_run(make_run(tmp_path / "night", 12, 4, 2), NOW + 5)
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


def test_a_run_that_its_patience_ended_is_finished(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", 12, 4, -1, "", "--run.patience=3", "--run.validate_every=1")
    line = "stopped early         3  validations in a row were no better"
    for step, waited, state in ((13, 2, "running"), (14, 3, "finished"), (15, 0, "running")):
        with (folder / "metrics.jsonl").open("a") as log:
            log.write(record(step, validations_waited=waited).to_json() + "\n")
        run = read_run(folder, NOW + 5)
        assert run.state == state
        assert (run.remaining_s > 0) == (state == "running")
        assert (line in render(run, 100)) == (state == "finished")


def test_ctrl_c_leaves_the_last_view_on_the_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(time, "sleep", interrupted)
    assert watch.main([str(make_run(tmp_path / "r", 12, 2))]) == 0
    screen, after = capsys.readouterr().out.split("\x1b[?1049l")
    assert screen.startswith("\x1b[?1049h")
    assert "step 12/40" in after


def test_a_running_view_shows_the_time_left(tmp_path: Path) -> None:
    text = "\n".join(render(read_run(make_run(tmp_path / "r", 12), NOW + 5), price=3600.0))
    assert "left 56s" in text
    assert "$24.00 spent, $56.00 remaining" in text
    once = "\n".join(render(read_run(make_run(tmp_path / "t", 1), NOW)))
    assert "median of 1 report, p90" in once
    early = "\n".join(render(read_run(make_run(tmp_path / "s", 0), NOW)))
    assert "no step reported yet" in early


def test_watch_prints_once_into_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert watch.main([str(make_run(tmp_path / "r", 12))]) == 0
    assert "step 12/40" in capsys.readouterr().out
    assert watch.main([str(tmp_path / "r"), "--once", "--instance", "trn1.2xlarge"]) == 0
    assert "$" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--every=0 is not above 0"):
        watch.main([str(tmp_path / "r"), "--every", "0"])
    with pytest.raises(DataError, match="is not the folder of a run"):
        watch.main([str(tmp_path)])


def test_a_run_that_has_not_begun_is_named_as_such(tmp_path: Path) -> None:
    soon = "a run makes its folder some seconds after its start"
    with pytest.raises(
        DataError, match=f"run: is not the folder of a run \\(does not exist; {soon}"
    ):
        watch.main([str(tmp_path / "run")])
    (tmp_path / "run").mkdir()
    with pytest.raises(DataError, match=f"\\(is empty; {soon}"):
        watch.main([str(tmp_path / "run"), "--once"])
    with lock_folder(tmp_path / "run"):
        run = read_run(tmp_path / "run")
        assert run.state == "starting"
        assert "no step reported yet" in "\n".join(render(run))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").write_text("{}")
    with pytest.raises(DataError, match=r"has neither config\.toml nor metrics.jsonl"):
        watch.main([str(tmp_path / "data")])


def test_sparks_and_percentiles() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1, 1, 9, 9], 2) == "▁█"
    assert sparkline([5.0], 4) == "▁"
    assert sparkline([float("nan"), 1.0, 2.0], 3) == " ▁█"
    assert percentiles(range(1, 101), (1, 50, 99)) == [1, 50, 99]
    assert percentiles([3.0, 1.0], (50, 90)) == [1.0, 3.0]


def test_files_of_others_among_the_heartbeats_hide_no_rank(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3, ranks=4)
    for name in ("rank-", "rank-!", "rank-.swp", "rank--1", "rank-0000x"):
        (run / "heartbeats" / name).write_bytes((run / "heartbeats" / "rank-00003").read_bytes())
    assert [rank.number for rank in read_run(run).ranks] == [0, 1, 2, 3]


def test_a_lock_that_is_far_too_large_is_read_in_part(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3)
    (run / "lock").write_text("pid 1 on another since yesterday\n")
    os.truncate(run / "lock", 2**36)
    assert read_run(run).locked is None
