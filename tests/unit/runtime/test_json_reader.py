"""JSON of other programs: values within bounds, or one line that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamax.runtime.json_reader import (
    MAX_DEPTH,
    MAX_DIGITS,
    JsonError,
    parse_json,
    parse_object,
    read_object,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**38), 10**38) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(VALUES)
def test_what_python_writes_is_read_as_python_reads_it(value: Any) -> None:
    text = json.dumps(value)
    assert parse_json(text) == json.loads(text)
    assert parse_json(text.encode(), strict=False) == json.loads(text)


@given(st.binary() | st.text())
def test_any_other_text_is_a_json_error_of_one_line(data: bytes | str) -> None:
    problem = ""
    try:
        parse_json(data)
    except JsonError as error:
        problem = str(error)
    assert problem == "" or problem.startswith(("is ", "holds "))
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"is not JSON \(line 1: Expecting value\)"),
        ('{"a": 1\n,}', r"is not JSON \(line 2"),
        (b'{"a": \n', r"is not JSON \(character 6: Expecting value\)"),
        (b'"\xff"', "not text in UTF-8"),
        ("[" * 20_000, "nested more than 64"),
        ("[" * 20_000 + "]" * 20_000, "nested more than 64"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested more than 64"),
        ('{"a":' * (MAX_DEPTH + 1) + "0" + "}" * (MAX_DEPTH + 1), "nested more than 64"),
        ("NaN", "holds NaN"),
        ("[-Infinity]", "holds -Infinity"),
        ('{"loss": 1e999}', "the number 1e999, which is out of range"),
        ("9" * (MAX_DIGITS + 1), "an integer of 41 digits"),
        ("-" + "9" * 10_000, "an integer of 10001 digits"),
    ],
)
def test_out_of_bounds(text: str | bytes, message: str) -> None:
    with pytest.raises(JsonError, match=message):
        parse_json(text)


def test_depth_is_of_containers_inside_each_other() -> None:
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(deep)
    assert len(parse_json(f"[{'[], ' * 5000}{{}}]")) == 5001
    assert parse_json(json.dumps("[{" * 5000)) == "[{" * 5000


def test_without_strict_numbers_are_those_of_python() -> None:
    assert parse_json("[Infinity, 1e999]", strict=False) == [float("inf")] * 2
    with pytest.raises(JsonError, match="thousands of digits"):
        parse_json("9" * 10_000, strict=False)
    with pytest.raises(JsonError, match="nested more than 64"):
        parse_json("[" * 65 + "]" * 65, strict=False)


def test_objects_and_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1]}')
    assert read_object(path) == parse_object('{"a": [1]}') == {"a": [1]}
    with pytest.raises(JsonError, match=r"larger than 4.76837e-06 MiB"):
        read_object(path, max_bytes=5)
    path.write_text("[]")
    for read in (lambda: read_object(path), lambda: parse_object("3")):
        with pytest.raises(JsonError, match="is not a JSON object"):
            read()
    with pytest.raises(JsonError, match="is not a plain file"):
        read_object(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "none")
