"""The strict loader that runs, jobs and machines share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from llamax.config.toml import Problems, build, parse_value, read_toml, to_toml
from llamax.config.types import Count, Fraction, Natural
from llamax.runtime.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    share: Fraction = 0.5


@dataclass(frozen=True)
class Outer:
    needed: Count
    kind: Literal["a", "b"]
    texts: tuple[str, ...] = ()
    ids: Natural | tuple[Natural, ...] | None = None
    inner: Inner = Inner()
    maybe: Inner | None = None


RIGHT = {"needed": 2, "kind": "b"}


def lines(table: Any, **given: Any) -> list[str]:
    problems = Problems()
    section = build(Outer, table, problems, given=given)
    return problems.lines(section)


def test_a_table_becomes_a_section() -> None:
    problems = Problems()
    table = {**RIGHT, "texts": ["x"], "ids": [1, 2], "inner": {"share": 0}, "maybe": {}}
    assert build(Outer, table, problems) == Outer(2, "b", ("x",), (1, 2), Inner(0.0), Inner())
    assert build(Outer, RIGHT, problems) == Outer(2, "b")
    assert not problems.unknown
    assert not problems.unusable


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"neded": 1}, "neded is an unknown key; did you mean needed?"),
        ({"needed": 1.0}, "needed=1.0 is a float; write an integer"),
        ({"needed": True}, "needed=true is a truth value; write an integer"),
        ({"needed": 0}, "needed=0 is out of range; use 1 or more"),
        ({"kind": "c"}, 'kind="c" is unknown; write a or b'),
        ({"kind": 1}, "kind=1 is an integer; write a or b"),
        ({"texts": [1]}, "texts=[1] is a list; write a list of strings"),
        ({"texts": "x"}, 'texts="x" is a string; write a list of strings'),
        ({"ids": "x"}, 'ids="x" is a string; write an integer or a list of integers'),
        ({"ids": [1, -1]}, "ids=(1, -1) is out of range; use 0 or more"),
        ({"inner": 3}, "inner=3 is an integer; write it as a section [inner]"),
        ({"inner": {"share": 1}}, "inner.share=1.0 is out of range; use 0 or more and below 1"),
        ({"maybe": {"shard": 1}}, "maybe.shard is an unknown key; did you mean share?"),
    ],
)
def test_a_mistake_is_reported_once(changes: dict[str, Any], line: str) -> None:
    assert lines({**RIGHT, **changes}) == [line]


def test_all_mistakes_are_reported_at_once_and_a_stand_in_is_no_mistake() -> None:
    assert lines({"kind": 3, "nope": 1, "inner": {"share": "x"}, "ids": -1}) == [
        "nope is an unknown key; there are needed, kind, texts, ids, inner, maybe",
        "kind=3 is an integer; write a or b",
        'inner.share="x" is a string; write a number',
        "needed is missing; write an integer",
        "ids=-1 is out of range; use 0 or more",
    ]


def test_what_is_given_is_no_key_of_the_table() -> None:
    assert lines({"kind": "a"}, needed=3) == []
    assert lines({"kind": "a", "needed": 3}, needed=3) == [
        "needed is an unknown key; there are kind, texts, ids, inner, maybe"
    ]


def test_a_file_that_is_no_toml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("a = 1\n")
    assert read_toml(path) == {"a": 1}
    deep = (b".a" * 900)[1:] + b" = 1", b"a = " + b"[" * 100 + b"]" * 100
    for text in (b"a =\n", b"\xff", b"a = " + b"[" * 5000, *deep):
        path.write_bytes(text)
        with pytest.raises(ConfigError, match=r"x\.toml: cannot be read as TOML: "):
            read_toml(path)
    with pytest.raises(ConfigError, match=r"none\.toml: no such file; check the path$"):
        read_toml(tmp_path / "none.toml")


def test_values_of_the_command_line_are_toml_or_text() -> None:
    for deep in ("[" * 5000, "[" * 100 + "]" * 100, "{a = " * 100 + "1" + "}" * 100):
        assert parse_value(deep) == deep
    assert [parse_value(text) for text in ("1", "1e3", "true", "[1, 2]", "ten", "'x'")] == [
        1,
        1000.0,
        True,
        [1, 2],
        "ten",
        "x",
    ]


def test_values_are_written_as_toml() -> None:
    assert to_toml((1, "a\x7f\n", True, 1e-05)) == '[1, "a\\u007f\\n", true, 1e-05]'
