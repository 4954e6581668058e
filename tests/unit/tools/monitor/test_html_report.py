"""The page of a run."""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llamax.cli import report
from llamax.config.load import dump_config, load_config
from llamax.runtime.errors import DataError
from llamax.tools.monitor.html_report import page, told_apart
from llamax.tools.monitor.run_folder import read_run
from llamax.training.metrics import Record

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


def test_a_run_without_records_still_has_a_page(tmp_path: Path) -> None:
    assert "starting" in page([read_run(make(tmp_path / "r", 0), NOW)])


def test_report_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = make(tmp_path / "r", 12), tmp_path / "page.html"
    assert report.main([str(folder), "--out", str(out)]) == 0
    assert out.read_text().startswith("<!doctype html>")
    with pytest.raises(DataError, match="cannot be written"):
        report.main([str(folder), "--out", str(tmp_path / "no" / "page.html")])
