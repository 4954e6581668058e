"""``llamax cache``: what it prints, the order of its parts, and its mistakes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from llamax.cli import cache
from llamax.runtime.errors import BackendError, ConfigError

MODULE = "neuronxcc-2.23.6484.0/MODULE_1+2"
COMPILE = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True)
(folder / "model.neff").write_bytes(b"neff")
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"neuronx-cc": "2.23.6484.0"}
    monkeypatch.setattr(cache, "installed", versions.get)


def options(action: str, place: Path, local: Path) -> list[str]:
    return [action, f"--place={place}", f"--cache={local}"]


def compiling(local: Path, code: int = 0, *more: str) -> list[str]:
    return ["--", sys.executable, "-c", COMPILE, str(local / MODULE), str(code), *more]


def test_fill_compiles_sends_and_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, first, second = tmp_path / "-odd place", tmp_path / "a", tmp_path / "b"
    assert cache.main([*options("fill", place, first), *compiling(first)]) == 0
    took, sent = capsys.readouterr().out.splitlines()
    assert took == f"took 0 compiled programs, 0.0 MiB, from {place}; 0 were there"
    assert sent == f"sent 1 compiled program, 0.0 MiB, to {place}; 0 were there"
    record = json.loads(
        (place / "llamax-programs" / "neuronxcc-2.23.6484.0" / "compile-time.json").read_text()
    )
    assert record["programs"] == 1
    assert record["seconds"] > 0
    monkeypatch.setenv("NEURON_COMPILE_CACHE_URL", str(second))
    assert cache.main(["pull", f"--place={place}"]) == 0
    assert (second / MODULE / "model.neff").read_bytes() == b"neff"
    assert cache.main(["push", f"--place={place}"]) == 0
    assert capsys.readouterr().out.endswith("1 were there\n")


def test_nothing_is_sent_where_compiling_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, local = tmp_path / "place", tmp_path / "a"
    assert cache.main([*options("fill", place, local), *compiling(local, 3)]) == 3
    assert not place.exists()
    assert capsys.readouterr().err == f"llamax: nothing is sent to {place}: the command failed\n"


def test_only_the_first_node_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, local = tmp_path / "place", tmp_path / "a"
    words = compiling(local, 0, "--node-rank", "1")
    assert cache.main([*options("fill", place, local), *words]) == 0
    assert capsys.readouterr().out == ""
    assert not place.exists()
    assert cache.node_rank(["torchrun", "--node-rank", "0", "x"]) == 0


def test_without_its_place_fill_compiles_and_then_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = tmp_path / "a"
    with pytest.raises(BackendError, match="gs:// needs the package gcsfs"):
        cache.main(["fill", "--place=gs://nothing/x", f"--cache={local}", *compiling(local)])
    assert (local / MODULE / "model.neff").exists()
    assert capsys.readouterr().err.endswith("; compiling without it\n")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("ftp://x/y", "is no address that is known here; use s3://bucket/path, gs://bucket/path, "),
        ("s3://", "names no bucket; use s3://bucket/path"),
        ("hf://datasets/x", "names no repository of the Hub; use hf://datasets/org/name"),
    ],
)
def test_an_address_that_is_none_is_refused_at_once(place: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^--place {place} {message}"):
        cache.main(["pull", f"--place={place}"])


def test_what_is_left_out_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, local = tmp_path / "place", tmp_path / "a"
    (local / MODULE).mkdir(parents=True)
    assert cache.main(options("push", place, local)) == 2
    assert capsys.readouterr().out.endswith(f"{MODULE} is left out: it has no model.neff\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fill", "--place=x"], "fill needs a command after --"),
        (["push", "--place=x", "--", "ls"], "push runs no command"),
        (
            ["push", "--place=x", "--cache=none"],
            "there is no compile cache none; set --cache to its folder",
        ),
        (["pull", "--place=x", "--cache=s3://bucket"], "s3://bucket is not a folder"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cache.main(words)
