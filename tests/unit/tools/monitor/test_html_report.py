"""The page of a run."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.run_folders import NOW, make_run

from llamax.cli import plot, report
from llamax.runtime.errors import DataError
from llamax.tools.monitor.html_report import page, with_distinct_names
from llamax.tools.monitor.run_folder import read_run

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
    runs = [read_run(make_run(tmp_path / f"a<{k}>&", 12 + k, 4), NOW + 5) for k in range(count)]
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
    folder = make_run(tmp_path / "r", 6)  # validated at step 8
    told = {"ranks": 4, "dollars_per_hour": 0.0, "instance": ""}
    (folder / "environment.json").write_text(json.dumps(told))
    text = page([read_run(folder, NOW)])
    assert "<td>ranks" in text
    for words in ("best validation", "cost", "<td>instance", "<td>dollars_per_hour"):
        assert words not in text, words
    assert "best validation" in page([read_run(make_run(tmp_path / "s", 9), NOW)])


def test_runs_that_differ_are_marked(tmp_path: Path) -> None:
    one, other = (make_run(tmp_path / name, 12) for name in "ab")
    changed = (other / "config.toml").read_text().replace("seed = 0", "seed = 7")
    (other / "config.toml").write_text(changed)
    text = page([read_run(folder, NOW) for folder in (one, other)])
    differing = text.partition("What differs")[2].partition("Configuration")[0]
    assert re.findall(r"<tr><td>([a-z._]+)", differing) == ["run.seed"]
    assert text.count("<tr class=marked>") == 1
    assert "What differs</h2><p>no setting</p>" in page([read_run(one, NOW)] * 2)


def test_runs_with_the_same_name_are_labelled_by_their_paths(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, 12) for name in ("x/night", "y/night", "day")]
    found = with_distinct_names([read_run(folder, NOW) for folder in folders])
    assert [run.name for run in found] == [str(folders[0]), str(folders[1]), "day"]


def test_a_run_without_records_still_has_a_page(tmp_path: Path) -> None:
    assert "starting" in page([read_run(make_run(tmp_path / "r", 0), NOW)])


def test_report_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = make_run(tmp_path / "r", 12), tmp_path / "page.html"
    assert report.main([str(folder), "--out", str(out)]) == 0
    assert out.read_text().startswith("<!doctype html>")
    with pytest.raises(DataError, match="cannot be written"):
        report.main([str(folder), "--out", str(tmp_path / "no" / "page.html")])


@pytest.mark.parametrize("name", ["notes.html", "loss.png", "loss.svg", "loss.pdf"])
def test_a_file_of_the_user_is_not_replaced(tmp_path: Path, name: str) -> None:
    folder, out = make_run(tmp_path / "r", 12), tmp_path / name
    command = report if name.endswith("html") else plot
    for _ in range(2):  # its own output is
        assert command.main([str(folder), "--out", str(out)]) == 0
    out.write_text("notes of the user")
    with pytest.raises(DataError, match="exists and is not an earlier output"):
        command.main([str(folder), "--out", str(out)])
    assert out.read_text() == "notes of the user"
