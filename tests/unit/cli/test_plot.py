"""``llamax plot``: the names of runs, and what cannot be drawn or written."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from llamax.runtime.errors import BackendError, DataError, LinkError
from llamax.tools.monitor import plot
from llamax.training.metrics import Record


def test_runs_of_one_name_are_plotted_by_their_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(1, 8, 1.0, 0.1, 2.0, 1.0, 1e-3, 80.0, 0, 0.1)
    for each in ("a/run", "b/run", "c/other"):
        (tmp_path / each).mkdir(parents=True)
        (tmp_path / each / "metrics.jsonl").write_text(record.to_json() + "\n")
    monkeypatch.chdir(tmp_path)
    folders = [Path("a/run"), Path("b/run"), tmp_path / "c/other"]
    assert list(plot.read_runs(folders)) == ["a/run", "b/run", "other"]
    monkeypatch.chdir(tmp_path / "a" / "run")
    assert list(plot.read_runs([Path()])) == ["run"]


def test_a_run_without_records_is_refused(tmp_path: Path) -> None:
    """A run without records yet, a folder that holds no run, and a missing folder differ."""
    for folder, what in ((tmp_path, "is empty"), (tmp_path / "no", "does not exist")):
        with pytest.raises(DataError, match=rf"is not the folder of a run \({what}"):
            plot.read_runs([folder])
    (tmp_path / "config.toml").touch()
    with pytest.raises(DataError, match=r"has no records yet in metrics\.jsonl; plot it later"):
        plot.read_runs([tmp_path])


def test_drawing_without_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendError, match=r"pip install 'llamax\[plot\]'$"):
        plot.draw({}, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


CURVES = {
    "consumed_tokens": np.array([8.0, 16.0]),
    "loss": np.array([2.0, 1.0]),
    "validation_loss": np.array([np.nan, 3.0]),
}


def texts_in(path: Path) -> list[str]:
    """The texts of an SVG that keeps them as text."""
    root = ElementTree.parse(path).getroot()
    return ["".join(each.itertext()) for each in root.iter("{http://www.w3.org/2000/svg}text")]


def test_names_are_drawn_letter_by_letter(tmp_path: Path) -> None:
    """A name with dollar signs is no formula, and one that begins with "_" is in the legend."""
    matplotlib = pytest.importorskip("matplotlib")
    names = ["a$x_$b", "_first", r"$\frac$", "$", "red\x1b[31m", "안녕"]
    with matplotlib.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.draw(dict.fromkeys(names, CURVES), tmp_path / "p.svg", (r"$\frac$", 1.0))
    drawn = texts_in(tmp_path / "p.svg")
    for name in [*names[:4], "_first, validation", r"red\x1b[31m", "안녕", r"$\frac$ 1.00"]:
        assert name in drawn


@pytest.mark.parametrize(
    ("tokens", "label", "last"),
    [
        (16.0, "consumed tokens", "16"),
        (1e3, "consumed tokens, thousands", "1.0"),
        (800e3, "consumed tokens, thousands", "800"),
        (30e6, "consumed tokens, millions", "30"),
        (5e9, "consumed tokens, billions", "5"),
        (15e12, "consumed tokens, trillions", "14"),
    ],
)
def test_the_axis_has_the_unit_of_the_longest_run(
    tmp_path: Path, tokens: float, label: str, last: str
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    long = {**CURVES, "consumed_tokens": np.array([0.0, tokens])}
    short = {**CURVES, "consumed_tokens": np.array([0.0, tokens / 1e3])}
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot.draw({"short": short, "long": long}, tmp_path / "p.svg")
    drawn = texts_in(tmp_path / "p.svg")
    assert label in drawn
    assert any(text.startswith(last) for text in drawn), "a tick near the end, in that unit"


@pytest.mark.parametrize("loss", [1e308, -1e308, 0.0])
def test_any_finite_loss_is_drawn(tmp_path: Path, loss: float) -> None:
    pytest.importorskip("matplotlib")
    curves = {**CURVES, "loss": np.array([2.0, loss])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.draw({"run": curves}, tmp_path / "p.png", ("high", loss))
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["p", "p.xyz", "p.png.bak", "png"])
def test_an_ending_of_no_picture_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}: a picture ends with \.png, \.svg, \.pdf; "):
        plot.draw({"run": CURVES}, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("precious")
    for folder, why in (("missing", "No such file or directory"), ("file", "Not a directory")):
        with pytest.raises(DataError, match=rf"p.png: cannot be written \({why}\); check `out`"):
            plot.draw({"run": CURVES}, tmp_path / folder / "p.png")
    (tmp_path / "p.png").symlink_to("file")
    with pytest.raises(LinkError, match=r"p.png is a link to file; remove it"):
        plot.draw({"run": CURVES}, tmp_path / "p.png")
    assert (tmp_path / "file").read_text() == "precious"
