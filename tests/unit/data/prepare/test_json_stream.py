"""Rows of a JSON file read one by one: those of the json module, or one line of a mistake."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamax.data.prepare import json_stream
from llamax.data.prepare.json_stream import json_rows, top_level_keys
from llamax.runtime.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def rows_in(text: str, path: Path, most: int = 2**20) -> list[Any]:
    path.write_text(text, encoding="utf-8")
    return list(json_rows(path, most))


@given(
    rows=st.lists(VALUES, max_size=6), indent=st.sampled_from([None, 2]), block=st.integers(1, 9)
)
def test_a_list_is_read_as_the_json_module_reads_it(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], indent: int | None, block: int
) -> None:
    path = tmp_path_factory.mktemp("list") / "rows.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llamax.data.prepare.file_kinds.BLOCK_BYTES", block)
        patch.setattr(json_stream, "BLOCK_BYTES", block)
        assert rows_in(json.dumps(rows, indent=indent), path) == rows
        table = {"version": 1, "data": rows, "note": {"a": [1]}}
        assert rows_in(json.dumps(table, ensure_ascii=False, indent=indent), path) == rows
        assert top_level_keys(path) == {"version": False, "data": True, "note": False}


def test_packed_files_and_byte_order_marks(tmp_path: Path) -> None:
    path = tmp_path / "rows.json.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbf [{"text": "a"}, {"text": "b"}] \n'))
    assert list(json_rows(path)) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"a": 1}, {"a": 2', "is not JSON (Expecting ',' delimiter in row 2); correct it"),
        ('[{"a": 1} {"a": 2}]', "is not JSON (expecting ',' in row 1); correct it"),
        ("[1, 2] 3", "is not JSON (something follows its value in row 2); correct it"),
        ("{1: 2}", "is not JSON (expecting a key in double quotes); correct it"),
        ('{"a": 1, "b": 2}', "is neither a list of rows nor an object with one; use JSONL"),
        ("[" * 3000 + "]" * 3000, "levels deep (row 1)"),
        ('["' + "a" * 5000 + '"]', "row 1 has more than 1 KiB; split it"),
    ],
)
def test_what_is_not_rows(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError) as caught:
        rows_in(text, tmp_path / "rows.json", most=1024)
    assert words in str(caught.value)
