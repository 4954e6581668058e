"""Files of Arrow, and the folders that ``datasets`` saves; judged by pyarrow and ``datasets``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llamax.data.chat.template_source import source_of
from llamax.data.chat.templates import Template
from llamax.data.prepare import file_kinds
from llamax.data.prepare.row_samples import read_sample
from llamax.data.prepare.saved_dataset import files_of, held_out, splits_of
from llamax.data.prepare.tables import plan_tables, read_rows
from llamax.data.prepare.text_files import plan
from llamax.runtime.errors import DataError

pyarrow = pytest.importorskip("pyarrow")

Rows = list[dict[str, Any]]
ROWS: Rows = [
    {
        "question": f"Q{n}?",
        "answer": f"é {n}" * (n % 7 + 1),
        "context": None if n % 3 else f"c{n}",
        "meta": {"n": n, "tags": ["a", "b"][: n % 3]},
        "turns": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": None}],
    }
    for n in range(100)
]


def stream(path: Path, rows: Rows, batch: int = 9) -> Path:
    """A file as ``datasets`` writes it."""
    table = pyarrow.Table.from_pylist(rows) if rows else pyarrow.table({"text": ["x"]})[:0]
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return path


def save(folder: Path, shards: Sequence[Rows], **state: Any) -> Path:
    """A folder as ``Dataset.save_to_disk`` writes it."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{len(shards):05d}.arrow" for n in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        stream(folder / name, rows)
    files = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(files | state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def save_splits(folder: Path, **splits: Rows) -> Path:
    for name, rows in splits.items():
        save(folder / name, [rows], _split=name)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": [*splits]}))
    return folder


def read(path: Path, split: str = "", limit: int = 0) -> Rows:
    ranges = plan_tables([str(path)], split, limit)
    return [row for each in ranges for _, row in read_rows(each)]


@pytest.mark.parametrize("chunk_bytes", [2**20, 2000, 1])
@pytest.mark.parametrize("kind", ["stream", "file", "lz4"])
def test_rows_are_those_of_pyarrow_however_they_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, chunk_bytes: int
) -> None:
    monkeypatch.setattr(file_kinds, "CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "a.arrow"
    if kind == "stream":
        stream(path, ROWS)
    else:
        options = pyarrow.ipc.IpcWriteOptions(compression="lz4" if kind == "lz4" else None)
        table = pyarrow.Table.from_pylist(ROWS)
        with pyarrow.ipc.new_file(path, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=9)
    assert (len(plan_tables([str(path)])) == 1) == (chunk_bytes == 2**20)
    assert read(path) == ROWS
    assert read(path, "train[13:57]") == ROWS[13:57]
    assert read(path, limit=31) == ROWS[:31]
    places = [place for each in plan_tables([str(path)]) for place, _ in read_rows(each)]
    assert places == [f"{path}: row {n + 1}" for n in range(len(ROWS))]


def test_a_saved_dataset_has_its_rows_in_the_order_of_its_state(tmp_path: Path) -> None:
    folder = save(tmp_path / "data", [ROWS[:40], [], ROWS[40:]])
    assert read(folder) == ROWS
    assert read(folder, "train[:25%]") == ROWS[:25]
    assert splits_of(folder) == {}
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].reverse()
    (folder / "state.json").write_text(json.dumps(state))
    assert read(folder) == ROWS[40:] + ROWS[:40]


def test_datasets_reads_the_same_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(tmp_path / "whole", num_shards=3)
    made.shuffle(seed=1).select(range(30)).save_to_disk(tmp_path / "part")
    datasets.DatasetDict(train=made, test=made.select([5, 3])).save_to_disk(tmp_path / "splits")
    for name in ("whole", "part"):
        assert read(tmp_path / name) == [*datasets.load_from_disk(tmp_path / name)]
    assert read(tmp_path / "splits") == ROWS
    assert read(tmp_path / "splits", "test") == [ROWS[5], ROWS[3]]


def test_splits_keep_their_purpose(tmp_path: Path) -> None:
    folder = save_splits(
        tmp_path / "data", train=ROWS[:50], valid=ROWS[50:60], test=ROWS[60:70], extra=ROWS[70:]
    )
    assert read(folder) == ROWS[:50]
    assert read(folder, "extra[1:]") == ROWS[71:]
    assert held_out([folder], "validation") == [folder / "valid"]
    assert held_out([folder, tmp_path], "test") == [folder / "test"]
    left: list[str] = []
    chunks = plan([folder], key="question", left=left)
    splits = {Path(each.path).parent.name: each.split for (each,) in chunks}  # type: ignore[union-attr]
    assert splits == {"train": "train", "valid": "validation", "test": "test"}
    assert left == [f"{folder}/extra/"]
    left = []
    plan_tables([str(folder)], "", left=left)
    assert left == [f"{folder}/{name}/" for name in ("valid", "test", "extra")]


def test_columns_of_bytes_are_left_out_of_memory(tmp_path: Path) -> None:
    image = {"bytes": b"\x89PNG" * 1000, "path": None}
    rows = [{"text": f"t{n}", "image": image, "raw": b"x", "sound": [image]} for n in range(3)]
    rows.append({"text": "t3", "image": None, "raw": None, "sound": None})
    left_out = [{"text": f"t{n}", "image": b"", "raw": b"", "sound": b""} for n in range(3)]
    assert read(stream(tmp_path / "a.arrow", rows)) == [*left_out, rows[3]]
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [*left_out, rows[3]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:700], "a.arrow: is not Arrow, or is cut short; copy it again"),
        (lambda raw: raw[:-8], "a.arrow: is not Arrow, or is cut short; copy it again"),
        (lambda raw: b"x" * 700 + raw[-8:], "a.arrow: is not Arrow, or is damaged ("),
        (lambda raw: raw[:-700] + raw[-8:], "a.arrow: is not Arrow, or is damaged ("),
        (lambda raw: raw.replace("é".encode(), b"\xc3\xff"), "is damaged ("),
        (lambda raw: b"FEA1" + raw, "a.arrow: is Feather of version 1, which is not read"),
        (lambda raw: b"ARROW1" + raw, "a.arrow: is not Arrow, or is damaged ("),
        (lambda raw: b"", "a.arrow: is not Arrow, or is damaged ("),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, damage: Any, message: str) -> None:
    path = stream(tmp_path / "a.arrow", ROWS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError) as refused:
        read(path)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_damaged_pages_of_parquet_are_refused_in_one_line(tmp_path: Path) -> None:
    """The end of the file, which describes it, is sound."""
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    sound, refused = path.read_bytes(), []
    for at in range(4, 1000, 7):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 0xFF]) + sound[at + 1 :])
        try:
            list(read_rows(plan_tables([str(path)])[0]))
        except DataError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert all(f"{path}: is not Parquet, or is damaged (" in message for message in refused)


def test_checksums_of_pages_are_checked_where_there_are_some(tmp_path: Path) -> None:
    """As parquet-mr, and so Spark, writes them; a flipped bit of a text has no other sign."""
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"text": ["a sound text", "another"]})
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    parquet.write_table(table, path, write_page_checksum=True, **options)
    assert read(path) == table.to_pylist()
    path.write_bytes(path.read_bytes().replace(b"a sound", b"a round"))
    with pytest.raises(DataError, match=r"rows\.parquet: is not Parquet, or is damaged \(.*CRC"):
        read(path)


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    """As in the head of a CSV: nobody knows which is meant."""
    from pyarrow import parquet

    table = pyarrow.table([["a"], ["b"], ["c"]], names=["id", "text", "text"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pyarrow.ipc.new_file(tmp_path / "rows.arrow", table.schema) as writer:
        writer.write_table(table)
    for path in (tmp_path / "rows.parquet", tmp_path / "rows.arrow"):
        with pytest.raises(DataError, match=rf"{path}: row 1: has two columns 'text'; rename"):
            read(path)


def test_tables_and_row_groups_without_rows_are_left_out(tmp_path: Path) -> None:
    from pyarrow import parquet

    table = pyarrow.table({"text": ["a", "b"]})
    with parquet.ParquetWriter(tmp_path / "rows.parquet", table.schema) as writer:
        for part in (table[:0], table[:1], table[:0], table[1:], table[:0]):
            writer.write_table(part)
    assert parquet.ParquetFile(tmp_path / "rows.parquet").num_row_groups == 5
    assert [
        place
        for rows in plan_tables([str(tmp_path / "rows.parquet")])
        for place, _ in read_rows(rows)
    ] == [f"{tmp_path}/rows.parquet: row {number}" for number in (1, 2)]
    parquet.write_table(table[:0], tmp_path / "none.parquet")
    left: list[str] = []
    inputs = [tmp_path / name for name in ("none.parquet", "rows.parquet")]
    assert len(plan(inputs, left=left)) == 2
    assert left == [str(tmp_path / "none.parquet")]
    with pytest.raises(
        DataError, match=r"only tables that have no row or no column 'text': .*none"
    ):
        plan([tmp_path / "none.parquet"])


def test_a_row_above_the_limit_is_refused(tmp_path: Path) -> None:
    path = stream(tmp_path / "a.arrow", [{"text": "short"}, {"text": "x" * 1000}], batch=1)
    (rows,) = plan_tables([str(path)])
    with pytest.raises(DataError, match=r"a.arrow: row 2: it has more than 500 B; split it"):
        list(read_rows(rows, 500))


def test_what_is_wrong_with_a_folder_is_one_line(tmp_path: Path) -> None:
    def refused(folder: Path, split: str = "") -> str:
        with pytest.raises(DataError) as error:
            read(folder, split)
        return str(error.value).replace(str(folder), "F")

    one = save(tmp_path / "one", [ROWS[:2], ROWS[2:4]], _split="test[:5]")
    assert refused(one, "train") == "F: has no split 'train' (splits: test)"
    assert len(read(one, "test")) == len(read(one)) == 4
    assert "holds the saved dataset" in refused(tmp_path)
    files_of(one)[1].unlink()
    assert refused(one).endswith(": is missing, and state.json names it; copy the folder again")
    old = save(tmp_path / "old", [ROWS], _indices_data_files=[{"filename": "indices.arrow"}])
    assert refused(old).startswith("F: was saved by an old version of datasets, with the order of")
    for state in ('{"_data_files": [{"filename": "../a"}]}', '{"_data_files": 3}', "{}"):
        (old / "state.json").write_text(state)
        assert refused(old).endswith("names no files of rows; save the dataset again")
    (old / "state.json").write_text("{")
    assert "state.json: cannot be read (" in refused(old)
    splits = save_splits(tmp_path / "splits", train_sft=ROWS, test_sft=ROWS)
    assert refused(splits) == (
        "F: has no split 'train' (splits: train_sft, test_sft); give the folder of one, such as "
        "F/train_sft"
    )
    (splits / "dataset_dict.json").write_text('{"splits": ["train", "gone"]}')
    assert refused(splits) == "F: its split 'train' is missing; copy the folder again"
    (splits / "dataset_dict.json").write_text('{"splits": ["/etc"]}')
    assert refused(splits).endswith("names no splits; save the dataset again")


def test_turns_that_datasets_holds_as_columns_are_turns(tmp_path: Path) -> None:
    """``Sequence({"from": .., "value": ..})`` is a struct of lists."""
    template = Template("usr-bot", source_of("usr-bot"))
    turns = {"from": ["system", "human", "gpt"], "value": ["s", "q", "a"]}
    (row,) = read(stream(tmp_path / "a.arrow", [{"conversations": turns}]))
    sample = read_sample(row, {}, "", template)
    assert [message["content"] for message in sample.messages] == ["s", "q", "a"]
    for wrong in ({"from": ["human"], "value": []}, {"from": "human"}, {}):
        with pytest.raises(DataError, match=r"not a list of {role, content}|no answer"):
            read_sample({"conversations": wrong}, {}, "", template)
