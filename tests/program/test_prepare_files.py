"""``llamax prepare``: what kind of file something is, what was taken and left, one long text."""

from __future__ import annotations

import csv
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.instruction import ROWS, llama2_tokenizer, prepare
from support.packed import packed

from llamax.cli.prepare import main
from llamax.data.dataset import open_dataset
from llamax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from llamax.data.tokenizer.train import train_sentencepiece
from llamax.runtime.errors import DataError

TABLE = [{"text": f"Document {i}, of rivers.", "url": f"https://example.org/{i}"} for i in range(6)]
LINES = "".join(json.dumps(row) + "\n" for row in TABLE)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama2_tokenizer(tmp_path_factory.mktemp("t"))


def texts(out: Path, tokenizer: Path) -> list[str]:
    own: Tokenizer = load_tokenizer(tokenizer)
    file = open_dataset(out).train
    edges = file.documents.astype(int).tolist()
    return [own.decode(file.tokens[a:b].tolist()) for a, b in pairwise(edges)]


def write_table(path: Path, rows: list[dict[str, Any]] = TABLE) -> Path:
    """Rows as the kind of file that the name says."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), path, row_group_size=2)
        return path
    if name.startswith("array"):
        text = json.dumps(rows, indent=1)
    elif ".json" in name or ".ndjson" in name:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if ".tsv" in name else ",")
            writer.writeheader()
            writer.writerows(rows)
        text = path.read_text()
    path.write_bytes(packed(name, text.encode()))
    return path


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.json", "c4-train.00000-of-01024.json.gz", "PART.JSONL", "A.JSON.GZ", "a.ndjson",
     "array.json", "array.JSON.gz", "a.csv", "B.TSV", "a.csv.gz", "a.parquet", "a.jsonl.zst",
     "B.JSON.ZST", "array.json.xz", "a.ndjson.bz2", "a.csv.zst", "a.tsv.bz2", "A.CSV.XZ"],
)  # fmt: skip
def test_a_file_of_rows_is_rows_by_any_name(
    tokenizer: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for key in ("text", "url"):
        out = prepare(tmp_path / key, write_table(tmp_path / name), "--tokenizer", tokenizer,
                      "--validation", "0", "--key", key)  # fmt: skip
        assert texts(out, tokenizer) == [row[key] for row in TABLE]
        said = capsys.readouterr().out
        other = {"text": "url", "url": "text"}[key]
        assert f"not read: {other} (6 rows)" in said
        assert "took 1 file\n" in said


def test_json_that_is_one_value_stays_a_text(tokenizer: Path, tmp_path: Path) -> None:
    for name, text in (
        ("package.json", '{\n "name": "x",\n "files": ["a"]\n}\n'),
        ("line.json", '{"name": "x"}\n'),
        ("list.json", "[1, 2]\n"),
        ("objects.json", '[{"name": "x"}]\n'),
        ("broken.json", '{"a": // comment\n 1}\n'),
    ):
        (tmp_path / name).write_text(text)
        out = prepare(tmp_path / f"out-{name}", tmp_path / name, "--tokenizer", tokenizer)
        assert texts(out, tokenizer) == [text]


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("a.csv", [{"instruction": "Q", "output": "A"}],
         r"a\.csv: is a table without a column 'text' \(columns: instruction, output\); name the "
         r"column of the text with --key, or use --template"),
        ("a.parquet", [{"body": "Q"}], r"a\.parquet: is a table without a column 'text'"),
        ("a.parquet", [{"text": "Q"}, {"text": None}],
         r"a\.parquet: row 2: the row has no text under key 'text' \(it is NoneType\)"),
        ("a.parquet", [{"input_ids": [1, 2]}],
         r"a\.parquet: holds token ids \(columns: input_ids\), which are not read; give the text"),
        ("a.jsonl", [{"body": "Q"}], r"a\.jsonl:1: the row has no text under key 'text'"),
    ],
)  # fmt: skip
def test_a_table_without_text_is_refused(
    tokenizer: Path, tmp_path: Path, name: str, rows: list[dict[str, Any]], words: str
) -> None:
    path = write_table(tmp_path / name, rows)
    with pytest.raises(DataError, match=words) as caught:
        prepare(tmp_path / "out", path, "--tokenizer", tokenizer)
    assert "\n" not in str(caught.value)


def test_packed_files_and_empty_tables_are_named(tokenizer: Path, tmp_path: Path) -> None:
    given = ("--tokenizer", tokenizer)
    (tmp_path / "a.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    for more in ((), ("--template", "dolly")):
        with pytest.raises(DataError, match=r"zst: is packed \(\.tar\.zst\); unpack it, or pack"):
            prepare(tmp_path / "out", tmp_path / "a.tar.zst", *given, *more)
    (tmp_path / "a.csv").write_text("text,id\n")
    empty = r"a\.csv: holds no text, only tables that have no row or no column 'text': .*a\.csv"
    with pytest.raises(DataError, match=empty):
        prepare(tmp_path / "out", tmp_path / "a.csv", *given)
    (tmp_path / "a.json.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"a\.json\.gz: cannot be read"):
        prepare(tmp_path / "out", tmp_path / "a.json.gz", *given)
    folder = tmp_path / "folder"
    folder.mkdir()
    write_table(folder / "b.csv", [{"a": "1"}])
    with pytest.raises(
        DataError, match=r"only tables that have no row or no column 'text': .*b\.csv"
    ):
        prepare(tmp_path / "out", folder, *given)


def test_what_was_taken_and_what_was_left(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    (data / "old").mkdir(parents=True)
    for name in ("a.jsonl", "b.json"):
        write_table(data / name)
    for name in ("LICENSE", ".hidden", "old/c.jsonl"):
        (data / name).write_text(f"{name}\n")
    (data / "empty.txt").write_text("")
    write_table(data / "numbers.csv", [{"a": "1"}])
    given = ("--tokenizer", tokenizer, "--validation", "0")

    def said(out: str, *args: object) -> str:
        prepare(tmp_path / out, data, *given, *args)
        lines = capsys.readouterr().out
        none = "none: no document fell into it; a larger --validation holds out more\n"
        assert f"  validation.tokens  {none}" in lines
        (line,) = re.findall("took .*", lines)
        return str(line)

    assert said("1", "--glob", "*.json*", "--exclude", "old") == (
        "took 2 files, left 4: old/, LICENSE, empty.txt, numbers.csv"
    )
    assert said("2", "--exclude", "old") == (
        "took 3 files (2 of rows, 1 of text), left 3: old/, empty.txt, numbers.csv"
    )
    rows = [{"instruction": row["instruction"], "output": row["response"]} for row in ROWS]
    for path in sorted(data.rglob("*.*")):
        path.unlink()
    write_table(data / "train.JSON", rows)
    assert said("3", "--template", "dolly") == "took 1 file, left 1: LICENSE"


def test_one_long_text_has_its_end_held_out(tokenizer: Path, tmp_path: Path) -> None:
    lines = [f"Line {i} of a long text.\n" for i in range(2000)]
    (tmp_path / "book.txt").write_text("".join(lines))
    out = prepare(tmp_path / "out", tmp_path / "book.txt", "--tokenizer", tokenizer,
                  "--validation", "0.05")  # fmt: skip
    data, own = open_dataset(out), load_tokenizer(tokenizer)
    assert data.validation is not None
    train, held = (own.decode(np.asarray(f.tokens).tolist()) for f in (data.train, data.validation))
    assert train + held == "".join(lines)
    assert train.endswith("\n")
    assert 0.049 < len(held) / len(train + held) < 0.051
    none = prepare(tmp_path / "none", tmp_path / "book.txt", "--tokenizer", tokenizer,
                   "--validation", "0")  # fmt: skip
    assert open_dataset(none).validation is None
    trained = prepare(tmp_path / "trained", tmp_path / "book.txt", "--train-tokenizer", "300")
    assert open_dataset(trained).validation is not None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DataError("row 3: is no text")])
def test_an_error_in_the_texts_ends_the_training_of_a_tokenizer(
    tmp_path: Path, error: BaseException
) -> None:
    def failing() -> Any:
        yield from ["one two three four five\n" * 20] * 50
        raise error

    with pytest.raises(type(error)) as caught:
        train_sentencepiece(failing(), 300, tmp_path / "t.model")
    assert caught.value is error
    assert not (tmp_path / "t.model").exists()


def test_a_mistake_is_named_while_a_tokenizer_is_trained(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES + '{"text": 5}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:7: the row has no text under key 'text'"):
        main([str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"),
              "--train-tokenizer", "300"])  # fmt: skip


@pytest.mark.parametrize("options", [[], ["--template", "dolly", "--field", "instruction=text",
                                          "--field", "answer=url"]])  # fmt: skip
def test_what_is_to_be_held_out_or_is_there_twice_is_mentioned(
    tokenizer: Path, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "all"
    names = ("train/a.jsonl.zst", "test/b.jsonl.zst", "validation/b/c.jsonl", "train/A.jsonl.XZ",
             "more/train/a.jsonl", "more/other/a.jsonl", "test.jsonl")  # fmt: skip
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_table(folder / name)
    given = ("--tokenizer", tokenizer, "--validation", "0", *options)
    prepare(tmp_path / "out", folder, *given)
    assert capsys.readouterr().err == (
        f"llamax: {folder}: the text in test and validation is taken for training too; give "
        f"{folder}/train alone to leave it out\n"
    )
    write_table(folder / "train" / "a.jsonl")
    prepare(tmp_path / "other", folder / "train", *given)
    assert capsys.readouterr().err == (
        f"llamax: {folder}/train/a.jsonl and {folder}/train/a.jsonl.zst are both taken; move one "
        "away if they hold the same\n"
    )
