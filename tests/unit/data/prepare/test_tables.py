"""Tables that are far larger than their files."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import pytest

from llamax.data.prepare.tables import scan
from llamax.runtime.errors import DataError


@pytest.mark.parametrize("name", ["a.csv.gz", "a.tsv.gz", "a.jsonl.gz", "a.json.gz"])
def test_a_line_of_a_packed_table_is_not_held_beyond_the_longest_row(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    with gzip.open(path, "wb", 1) as file:
        file.write(b"a" * 2**25)
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            list(scan(path, most=2**20))
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
