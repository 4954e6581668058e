"""Tables that are far larger than their files."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from support.packed import PACK

from llamax.data.prepare.tables import scan
from llamax.runtime.errors import DataError


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json"])
def test_a_line_of_a_packed_table_is_not_held_beyond_the_longest_row(
    tmp_path: Path, name: str, ending: str
) -> None:
    path = tmp_path / f"{name}{ending}"
    path.write_bytes(PACK[ending](b"a" * 2**25))
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            list(scan(path, most=2**20))
        assert tracemalloc.get_traced_memory()[1] < 2**24, "8 MiB are the window of .xz"
    finally:
        tracemalloc.stop()
