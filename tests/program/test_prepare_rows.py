"""``llamax prepare --template``: tables of all kinds, slices, splits, mistakes in a line."""

from __future__ import annotations

import codecs
import csv
import gzip
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support.corpora import mistral
from support.instruction import ROWS, llama2_tokenizer, llama3_tokenizer, prepare, write_rows

from llamax.cli.prepare import main
from llamax.data.dataset import open_dataset
from llamax.data.prepare import file_kinds
from llamax.data.token_file import TokenFile
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.runtime.errors import DataError
from llamax.tools.inspect.description import describe


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama2_tokenizer(tmp_path_factory.mktemp("t"))


def dolly(row: dict[str, str]) -> tuple[str, str]:
    """What the tutorials write: the text before the answer, and the answer."""
    context = f"### Context\n{row['context']}\n\n" if row.get("context") else ""
    return f"### Instruction\n{row['instruction']}\n\n{context}### Answer\n", row["response"]


def documents(file: TokenFile) -> list[tuple[list[int], list[bool]]]:
    edges = file.documents.astype(int).tolist()
    return [
        (file.tokens[a:b].tolist(), file.counted(np.arange(a, b)).tolist())
        for a, b in pairwise(edges)
    ]


def test_samples_are_text_byte_for_byte(tokenizer: Path, tmp_path: Path) -> None:
    table = write_rows(tmp_path / "rows.jsonl", ROWS)
    out = prepare(tmp_path / "out", table, "--template", "dolly", "--tokenizer", tokenizer,
                  "--validation", "0")  # fmt: skip
    own, data = load_tokenizer(tokenizer), open_dataset(out)
    for row, (ids, counted) in zip(ROWS, documents(data.train), strict=True):
        prompt, answer = dolly(row)
        assert own.decode(ids) == prompt + answer
        assert ids == [1, *own.encode(prompt + answer), 2]
        assert counted == [i > len(own.encode(prompt)) for i in range(len(ids))]
        assert (
            own.decode([i for i, c in zip(ids, counted, strict=True) if c]).strip()
            == answer.strip()
        )
    assert data.train.header.counted == sum(sum(c) for _, c in documents(data.train))
    data.train.verify()


def test_every_kind_of_table_gives_the_same_bytes(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = [{"instruction": f"{i}\n\"q\", {r['instruction']}", "context": r.get("context", ""),
              "response": r["response"]} for i, r in enumerate(ROWS * 5)]  # fmt: skip
    write_rows(tmp_path / "a.jsonl", table)
    write_rows(tmp_path / "lines.json", table)
    (tmp_path / "a.json").write_text(json.dumps(table), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps({"version": 1, "data": table}), encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "mark.json").write_text(json.dumps(table), encoding="utf-8-sig")
    (tmp_path / "mark.jsonl").write_bytes(codecs.BOM_UTF8 + (tmp_path / "a.jsonl").read_bytes())
    tables = (("a.csv", ",", "utf-8"), ("a.tsv", "\t", "utf-8-sig"), ("B.CSV", ";", "utf-8-sig"),
              ("c.csv", "|", "utf-8"), ("d.csv", "\t", "utf-8"))  # fmt: skip
    for name, mark, encoding in tables:
        with (tmp_path / name).open("w", encoding=encoding, newline="") as file:
            writer = csv.DictWriter(file, list(table[0]), delimiter=mark)
            writer.writeheader()
            writer.writerows(table)
    names = ["a.jsonl", "lines.json", "a.json", "b.json", "a.jsonl.gz", "mark.json", "mark.jsonl"]
    names += [name for name, _, _ in tables]
    try:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(
            pyarrow.Table.from_pylist(table), tmp_path / "a.parquet", row_group_size=3
        )
        names.append("a.parquet")
    except ImportError:
        pass
    made = {}
    for size in (2**20, 300):
        monkeypatch.setattr(file_kinds, "CHUNK_BYTES", size)
        for name in names:
            out = prepare(tmp_path / f"{name}-{size}", tmp_path / name, "--template", "dolly",
                          "--tokenizer", tokenizer, "--validation", "0.2")  # fmt: skip
            made[out] = [(out / f"{s}.tokens").read_bytes() for s in ("train", "validation")]
    first, *others = made.values()
    assert all(other == first for other in others)


def test_slices_limits_and_files_of_splits(tokenizer: Path, tmp_path: Path) -> None:
    for name, count in (("train", 40), ("val", 6), ("test", 4)):
        table = [{"question": f"{name} {i}", "answer": "A"} for i in range(count)]
        write_rows(tmp_path / f"{name}.jsonl", table)
    own = load_tokenizer(tokenizer)

    def questions(*args: object) -> dict[str, list[str]]:
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        prepare(out, *args, "--template", "dolly", "--tokenizer", tokenizer)
        return {
            path.stem: [own.decode(ids).split("\n")[1] for ids, _ in documents(TokenFile(path))]
            for path in out.glob("*.tokens")
        }

    train = tmp_path / "train.jsonl"
    no = ("--validation", "0")
    assert questions(train, "--split", "train[:10%]", *no) == {
        "train": [f"train {i}" for i in range(4)]
    }
    assert questions(train, "--split", "train[-3:]", *no)["train"] == [
        "train 37",
        "train 38",
        "train 39",
    ]
    assert questions(train, "--split", "train[5:7]", *no)["train"] == ["train 5", "train 6"]
    assert questions(train, "--limit", 2, *no)["train"] == ["train 0", "train 1"]
    assert questions(tmp_path, "--split", "val", *no)["train"] == [f"val {i}" for i in range(6)]
    made = questions(train, "--validation-file", tmp_path / "val.jsonl", "--test-file",
                     tmp_path / "test.jsonl", "--limit", 5)  # fmt: skip
    assert made == {
        "train": [f"train {i}" for i in range(5)],
        "validation": [f"val {i}" for i in range(5)],
        "test": [f"test {i}" for i in range(4)],
    }
    two = questions(train, tmp_path / "val.jsonl", "--split", "train[39:42]", *no)["train"]
    assert two == ["train 39", "val 0", "val 1"]


def test_fields_system_and_conversations(tmp_path: Path) -> None:
    folder = llama3_tokenizer(tmp_path / "t")
    own = load_tokenizer(folder)
    table = [
        {"Q": "hi", "A": "ho"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
                           {"from": "human", "value": "unanswered"}]},
    ]  # fmt: skip
    out = prepare(tmp_path / "out", write_rows(tmp_path / "r.jsonl", table),
                  "--template", "llama3-chat", "--field", "instruction=Q", "--field", "answer=A",
                  "--system", "Sys.",
                  "--tokenizer", folder, "--validation", "0")  # fmt: skip
    first, second = (ids for ids, _ in documents(open_dataset(out).train))
    eot = own.special["<|eot_id|>"]
    assert [ids.count(eot) for ids in (first, second)] == [3, 3]
    assert first[-1] == second[-1] == eot, "the template ends the sample itself"
    assert "Sys." in own.decode(first)
    assert "unanswered" not in own.decode(second)
    assert first.count(own.bos_id) == 1


def test_the_outputs_are_printed(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_rows(tmp_path / "r.jsonl", [*ROWS, {"instruction": "?", "response": " "}])
    out = prepare(tmp_path / "out", table, "--template", "dolly", "--tokenizer", tokenizer,
                  "--validation", "0", "--drop-empty", "--length", "256")  # fmt: skip
    said = capsys.readouterr().out
    assert "5 rows, 1 with an empty answer dropped, in " in said
    assert " rows/s" in said
    assert "% of the tokens are answers" in said
    assert "best-fit at 256: 4 documents in " in said
    assert dict(describe(out, verify=True))["verified"] == "checksums of 1 file"
    raw = bytearray((out / "train.tokens").read_bytes())
    start, _ = TokenFile(out / "train.tokens").header.sections["counted"]
    raw[start] ^= 1
    (out / "train.tokens").write_bytes(raw)
    with pytest.raises(DataError, match="do not match their checksum"):
        list(describe(out, verify=True))


def test_what_is_not_read_is_named_or_refused(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "id": 7, "system": "Short." if i else None} for i, row in enumerate(ROWS)]
    args = (write_rows(tmp_path / "r.jsonl", rows), "--template", "dolly", "--tokenizer", tokenizer,
            "--validation", "0")  # fmt: skip
    line = "not read: id (4 rows), system (3 rows)"
    prepare(tmp_path / "out", *args)
    assert line in capsys.readouterr().out
    prepare(tmp_path / "out", *args)
    assert line in capsys.readouterr().out, "a dataset that is there says it too"
    for out in ("out", "other"):
        with pytest.raises(DataError, match=r"not read: id .4 rows.*leave out --strict"):
            prepare(tmp_path / out, *args, "--strict")
    calls = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    table = write_rows(
        tmp_path / "c.jsonl", [{"messages": [{"role": "user", "content": "Q"}, calls]}]
    )
    with pytest.raises(
        DataError, match=r"left for training.*read: messages\[\]\.tool_calls .1 row"
    ):
        prepare(tmp_path / "calls", table, "--template", "usr-bot", *args[3:], "--drop-empty")
    prepare(tmp_path / "short", write_rows(tmp_path / "s.jsonl", ROWS), *args[1:], "--strict")
    assert "not read" not in capsys.readouterr().out


def test_a_tokenizer_is_trained_on_the_samples(tmp_path: Path) -> None:
    table = write_rows(tmp_path / "r.jsonl", [
        {"question": f"Is {i} even?", "answer": f"{i} / 2 = {i / 2}, so {i % 2 == 0}"}
        for i in range(300)
    ])  # fmt: skip
    out = prepare(tmp_path / "out", table, "--template", "dolly", "--train-tokenizer", 320)
    assert load_tokenizer(out).vocab_size == 320
    prepare(tmp_path / "out", table, "--template", "dolly", "--train-tokenizer", 320)


# ---- real rows


def test_korean_survives(shared_data: Path, tmp_path: Path) -> None:
    table = shared_data / "korean_chatbot" / "ChatbotData.csv"
    out = prepare(tmp_path / "out", table, "--template", "usr-bot", "--field", "instruction=Q",
                  "--field", "answer=A", "--tokenizer", mistral(), "--validation", "0",
                  "--limit", 1000)  # fmt: skip
    own = load_tokenizer(out)
    with table.open(encoding="utf-8", newline="") as file:
        expected = [f"<usr> {row['Q']}\n<bot> {row['A']}" for row in csv.DictReader(file)]
    made = documents(open_dataset(out).train)
    assert len(made) == 1000
    for (ids, counted), text in zip(made, expected, strict=False):
        assert own.decode(ids) == text
        answer = own.decode([i for i, c in zip(ids, counted, strict=True) if c])
        assert text.endswith(f"<bot> {answer}")


def test_gsm8k_packs_to_98_percent(shared_data: Path, tmp_path: Path) -> None:
    from llamax.data.packing import Packs

    out = prepare(tmp_path / "out", shared_data / "gsm8k" / "train.jsonl", "--template", "dolly",
                  "--tokenizer", mistral(), "--validation", "0")  # fmt: skip
    packs = Packs(open_dataset(out).train, 2048)
    assert packs.fill > 0.98
    assert packs.longer == 0


# ---- mistakes


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"instruction": "Q"}\n', r"a\.jsonl: row 1: has no field for the answer "
         r"\(looked for answer, response, output, completion; found instruction\); "
         "use --field answer=NAME"),
        ("a.jsonl", '{"instruction": "Q", "answer": "A"}\n\n{"answer": "A"}',
         "row 2: has no field for the instr"),
        ("a.jsonl", '{"instruction": "Q", "answer": " "}', "row 1: has an empty answer; .*--drop"),
        ("a.jsonl", '{"instruction": " ", "answer": "A"}', "row 1: has an empty 'instruction'"),
        ("a.jsonl", '{"instruction": "Q", "answer": 7}', "row 1: has a field 'answer' that is int"),
        ("a.jsonl", '{"instruction": "Q", "answer": "\\ud800"}', "row 1: holds half a character"),
        ("a.jsonl", '{"instruction": "Q", "answer": "\ufdd0"}', r"row 1: .*U\+FDD0"),
        ("a.jsonl", '{"instruction"', "row 1: is not JSON"),
        ("a.jsonl", "[1]", "row 1: is list, not an object"),
        ("a.jsonl", "{}", "row 1: has no field for the instruction .*; found none"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "Q"}]}', "row 1: is a conversation"),
        ("a.jsonl", "\n", r"a\.jsonl: this leaves no row of 0"),
        ("a.json", "[1, 2", "a.json: is not JSON"),
        ("a.json", '{"x": 1, "y": 2}\n', "row 1: has no field"),
        ("a.json", '{"x": [\n1], "y": [2]}\n', "neither a list of rows nor an object with one"),
        ("a.csv", 'instruction,answer\nQ,A\nQ\n', "row 2: has 1 fields where the head names 2 "),
        ("a.csv", 'instruction,answer\nQ,A\n"Q,A\n', "row 2 is not CSV"),
        ("a.csv", "instruction,answer,answer\nQ,A,B\n", "row 1: .*head that names 'answer' twice"),
        ("a.csv", b"instruction,answer\nQ,\xff\n", "byte 21 is not UTF-8 .*to UTF-8, or leave"),
        ("a.txt", "x", r"a\.txt: is not a table of rows; give a \.jsonl"),
        ("a.parquet", "x", "is not Parquet|needs the package pyarrow"),
        ("a.jsonl.gz", "x", "cannot be read"),
    ],
)  # fmt: skip
def test_bad_rows(
    tokenizer: Path, tmp_path: Path, name: str, content: str | bytes, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(
        content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    )
    refused(words, tmp_path, path, "--template", "dolly", "--tokenizer", tokenizer)


@pytest.mark.parametrize(("name", "words"), [("a.jsonl", "row 1: is"), ("a.json", "a.json: is")])
def test_brackets_without_end(tokenizer: Path, tmp_path: Path, name: str, words: str) -> None:
    path = tmp_path / name
    path.write_text('{"x": ' + "[" * 10**5)
    refused(
        f"{words} nested more than 64 levels",
        tmp_path,
        path,
        "--template",
        "dolly",
        "--tokenizer",
        tokenizer,
    )


def refused(words: str, tmp_path: Path, *args: object) -> None:
    with pytest.raises(DataError, match=words) as caught:
        main([*map(str, args), "--out", str(tmp_path / "out"), "--workers", "1"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_bad_options(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_rows(tmp_path / "a.jsonl", ROWS)
    given = ("--tokenizer", tokenizer)
    with_template = (table, "--template", "dolly", *given)
    refused("--field is for rows", tmp_path, table, "--field", "answer=A", *given)
    refused("--limit is for rows", tmp_path, table, "--limit", "3", *given)
    refused("--glob is for text", tmp_path, *with_template, "--glob", "*.py")
    refused(r"template doly is neither built in", tmp_path, table, "--template", "doly", *given)
    refused(
        "--split=train is not understood|train\\[:x\\]",
        tmp_path,
        *with_template,
        "--split",
        "train[:x]",
    )
    refused(r"train\[9:\] leaves no row of 4", tmp_path, *with_template, "--split", "train[9:]")
    refused("without a split dev; leave", tmp_path, *with_template, "--split", "dev[:10%]")
    refused("is given twice; leave one out", tmp_path, table, *with_template)
    refused(
        "holds no rows of split dev",
        tmp_path,
        tmp_path,
        "--template",
        "dolly",
        *given,
        "--split",
        "dev",
    )
    refused("no such file or folder", tmp_path, tmp_path / "none", "--template", "dolly", *given)
    refused("needs the token", tmp_path, table, "--template", "llama3-chat", *given)
    refused(
        r"row 1: has no field for the answer \(looked for A;",
        tmp_path,
        *with_template,
        "--field",
        "answer=A",
    )
    refused(r"row 1: has no field for the context \(looked for CTX; found instruction, context",
            tmp_path, *with_template, "--field", "context=CTX")  # fmt: skip
    refused("reads neither messages nor system", tmp_path, *with_template, "--system", "Be short.")
    bad = tmp_path / "bad.jinja"
    bad.write_text("{{ answer.__class__.__base__ }}")
    refused(r"row 1: template .*bad\.jinja: is refused", tmp_path, table, "--template", bad, *given)
    with pytest.raises(SystemExit):
        main([str(table), "--out", "x", *map(str, given), "--template", "dolly", "--field", "x=y"])
    assert "'x=y' is not FIELD=COLUMN with a field of instruction" in capsys.readouterr().err
    prepare(tmp_path / "out", *with_template)
    with pytest.raises(DataError, match="another dataset, with template=dolly instead of alpaca"):
        prepare(tmp_path / "out", table, "--template", "alpaca", *given)
    says = "another dataset, with fields=none instead of answer=output,context=input;"
    fields = ("--field", "context=input", "--field", "answer=output")
    with pytest.raises(DataError, match=says):
        prepare(tmp_path / "out", *with_template, *fields)
