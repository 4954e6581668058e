"""What reading of rows costs does not depend on where files are cut."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import pytest

from llamax.data.prepare import file_kinds, tables, text_files
from llamax.data.prepare.pipeline import Prepared
from llamax.data.prepare.summary import describe_files
from llamax.data.prepare.unread import LONGEST_NAME, MOST_COUNTED, MOST_NAMES, count_names
from llamax.runtime.errors import DataError


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what is read from files of rows."""
    sizes: list[int] = []

    class Counting(io.BufferedReader):
        def readline(self, size: int | None = -1) -> bytes:
            line = super().readline(size)
            sizes.append(len(line))
            return line

    monkeypatch.setattr(text_files, "reading", lambda path: Counting(io.FileIO(path)))
    monkeypatch.setattr(file_kinds, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 100)
    return sizes


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_long_row_is_read_once(tmp_path: Path, read_bytes: list[int], rows: int) -> None:
    path = tmp_path / "x.jsonl"
    texts = [str(number) * 200_000 for number in range(rows)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    chunks = text_files.plan([path])
    assert len(chunks) > 200 * rows
    found = [text for chunk in chunks for text in text_files.documents(chunk, "text")]
    assert found == texts
    assert sum(read_bytes) < 2.5 * path.stat().st_size


def test_a_row_without_the_key_is_refused_with_a_short_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({f"k{number}": "" for number in range(10_000)}) + "\n")
    with pytest.raises(
        DataError, match=r"\(keys: k0, k1, .*\.\.\.\); name the key of the text with `key`, or"
    ) as error:
        list(text_files.documents(text_files.plan([path])[0], "text"))
    assert len(str(error.value)) < 500


def test_a_row_of_token_ids_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"input_ids": [1, 2]}\n')
    with pytest.raises(DataError, match=r"\(keys: input_ids, and token ids are not read\)"):
        list(text_files.documents(text_files.plan([path])[0], "text"))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("last", ["c0", ""])
def test_a_head_with_many_columns(tmp_path: Path, last: str) -> None:
    path = tmp_path / "x.csv"
    names = ",".join(f"c{number}" for number in range(200_000))
    path.write_text(f",{names},{last}\n" + "," * 200_001 + "\n")
    (rows,) = tables.scan(path)
    with pytest.raises(DataError, match=f"a head that names '{last}' twice"):
        next(tables.read_rows(rows))


def test_keys_of_single_rows_are_counted_up_to_a_limit() -> None:
    total: Counter[str] = Counter()
    for number in range(3 * MOST_COUNTED):
        count_names(total, ["id", f"key {number}", "x" * 10_000])
    assert total["id"] == 3 * MOST_COUNTED
    assert len(total) == MOST_COUNTED
    assert max(map(len, total)) == LONGEST_NAME
    count_names(total, {"id": 5, "new": 2})
    assert (total["id"], total["new"]) == (3 * MOST_COUNTED + 5, 0)


def test_files_that_were_left_are_named_once() -> None:
    def left(*names: str) -> str:
        return describe_files(Prepared(Path("out"), 9, "B", 2, 1.0, {}, {"text": 2}, names))

    assert left("a/test/", "b/LICENSE", "c/test/") == "took 2 files, left 3: 2 x test/, LICENSE"
    many = [f"{number}.bin" for number in range(MOST_NAMES)]
    assert left("x", "y/x", *many).endswith(f", {MOST_NAMES - 2}.bin and 1 more")
