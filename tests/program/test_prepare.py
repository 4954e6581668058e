"""``llamax prepare``: the same bytes whatever happens, and every mistake in one line."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support.corpora import python_sources
from support.instruction import llama2_tokenizer
from support.packed import PACK
from support.prepared import documents, run, text_folder

from llamax.cli.prepare import main
from llamax.data.batch_plan import BatchPlan
from llamax.data.dataset import open_dataset
from llamax.data.loader import Loader
from llamax.data.prepare import chunks, file_kinds, text_files
from llamax.data.prepare.summary import unigram_entropy
from llamax.data.prepare.text_chunks import TextChunk
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.data.tokenizer.train import train_sentencepiece
from llamax.runtime.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama2_tokenizer(tmp_path_factory.mktemp("t"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return text_folder(tmp_path / "text")


def test_documents_are_encoded_by_the_tokenizer(
    text: Path, tokenizer: Path, tmp_path: Path
) -> None:
    made = run(tmp_path / "out", text, "--glob", "*.py", "--tokenizer", tokenizer,
               "--validation", "0.3", "--workers", "1")  # fmt: skip
    assert set(made) == {"dataset.json", "tokenizer.model", "train.tokens", "validation.tokens"}
    data = open_dataset(tmp_path / "out")
    assert data.validation is not None
    assert data.tokenizer_path is not None
    own = load_tokenizer(data.tokenizer_path)
    paths = sorted(text.rglob("*.py"))
    sources = [p.read_text(encoding="utf-8") for p in paths if not p.name.startswith(".")]
    want = [[1, *own.encode(source), 2] for source in sources if source]
    got = documents(data.train) + documents(data.validation)
    assert sorted(got) == sorted(want)
    assert [d for d in want if d in documents(data.train)] == documents(data.train)
    assert 3 < len(documents(data.validation)) < 25
    sizes = data.train.header.text_bytes + data.validation.header.text_bytes
    assert sizes == sum(len(source.encode()) for source in sources)
    assert len(Loader(data.train, BatchPlan(0, 64, 4, 2)).step()) == 2


def test_workers_and_formats_change_no_byte(
    text: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.dumps({"body": source}) for source in python_sources(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n\n", encoding="utf-8")
    for ending, pack in PACK.items():
        parts = ["\n".join(rows[:9]) + "\n", "\n".join(rows[9:])]
        whole = b"".join(pack(part.encode()) for part in parts)
        (tmp_path / f"packed.jsonl{ending}").write_bytes(whole)
    made = {}
    inputs = [("rows.jsonl", 2**22), ("rows.jsonl", 50_000)]
    for name, size in (*inputs, *((f"packed.jsonl{ending}", 50_000) for ending in PACK)):
        monkeypatch.setattr(file_kinds, "CHUNK_BYTES", size)
        for workers, alone_s in ((1, 0.0), (2, -1.0), (2, 0.0), (2, math.inf)):
            monkeypatch.setattr(chunks, "ALONE_S", alone_s)
            monkeypatch.setattr(chunks, "ALONE_BYTES", 0 if alone_s < 0 else 2**22)
            out = tmp_path / f"{name}-{size}-{workers}-{alone_s}"
            made[out] = run(out, tmp_path / name, "--key", "body", "--tokenizer", tokenizer,
                            "--workers", workers, "--validation", "0.2")  # fmt: skip
    first, *others = made.values()
    for other in others:
        assert other["train.tokens"] == first["train.tokens"]
        assert other["validation.tokens"] == first["validation.tokens"]


@pytest.mark.parametrize(
    ("alone_s", "size", "forks"),
    [(math.inf, 2**22, 0), (0.0, 2**22, 2), (math.inf, 2**22 + 1, 2), (math.inf, 0, 2)],
)
def test_workers_begin_where_the_work_is_worth_it(
    alone_s: float,
    size: int,
    forks: int,
    text: Path,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fork, forked = os.fork, []

    def counted() -> int:
        forked.append(1)
        return fork()

    monkeypatch.setattr(os, "fork", counted)
    monkeypatch.setattr(file_kinds, "CHUNK_BYTES", 30_000)
    monkeypatch.setattr(chunks, "ALONE_S", alone_s)
    monkeypatch.setattr(TextChunk, "size_bytes", size)  # 0: not known, as of Parquet
    run(tmp_path / "out", text, "--glob", "*.py", "--tokenizer", tokenizer, "--workers", 2)
    assert len(forked) == forks


def test_a_byte_order_mark_is_no_text(tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    rows = "".join(json.dumps({"text": each}) + "\r\n" for each in ("\ufeffrow", "last"))
    (folder / "a.txt").write_text("\ufefftext \ufeff", encoding="utf-8")
    (folder / "b.jsonl").write_text("\ufeff" + rows, encoding="utf-8")
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(("\ufeff" + rows).encode()))
    run(tmp_path / "out", folder, "--tokenizer", tokenizer, "--validation", "0")
    encode, want = load_tokenizer(tokenizer).encode, ["text \ufeff", *["\ufeffrow", "last"] * 2]
    got = documents(open_dataset(tmp_path / "out").train)
    assert got == [[1, *encode(text), 2] for text in want]


def test_flags_choose_the_special_tokens(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", text / "00.py", "--tokenizer", tokenizer, "--no-bos", "--no-eos",
        "--validation", "0")  # fmt: skip
    data = open_dataset(tmp_path / "out")
    assert data.validation is None
    assert data.train.header.bos_id is data.train.header.eos_id is None
    assert documents(data.train) == [load_tokenizer(tokenizer).encode((text / "00.py").read_text())]


def test_it_trains_a_tokenizer_and_finds_it_again(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [text, "--glob", "*.py", "--train-tokenizer", 500, "--workers", 1]
    made = run(tmp_path / "out", *args)
    assert load_tokenizer(tmp_path / "out").vocab_size == 500
    said = capsys.readouterr().out
    entropy, _ = unigram_entropy(open_dataset(tmp_path / "out").train)
    assert f"unigram entropy {entropy:.3f} nats" in said
    assert 3 < entropy < np.log(500)
    assert run(tmp_path / "out", *args) == made
    with pytest.raises(DataError, match="holds another dataset, with another tokenizer"):
        run(tmp_path / "out", text, "--glob", "*.py", "--train-tokenizer", 600)


def test_finished_parts_are_not_made_again(
    text: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_kinds, "CHUNK_BYTES", 30_000)
    (text / "zz.py").write_bytes(b"\xff")
    args = [text, "--glob", "*.py", "--tokenizer", tokenizer, "--workers", 1]
    with pytest.raises(DataError, match=r"zz\.py"):
        run(tmp_path / "out", *args)
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / ".parts").glob("*.train.tokens")}
    assert len(kept) > 3
    (text / "zz.py").write_bytes(b"\xfe")
    with pytest.raises(DataError, match=r"zz\.py.*0xfe"):
        run(tmp_path / "out", *args)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


# ---- mistakes


def refused(words: str, *args: object, out: Path) -> None:
    with pytest.raises(DataError, match=words) as caught:
        main([*map(str, args), "--out", str(out)])
    assert "\n" not in str(caught.value)
    assert not (out / "dataset.json").exists()


ROW = json.dumps({"text": "fine"}) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"good \xff bad", r"a\.txt: byte 5 is not UTF-8 text \(0xff\)"),
        ("a.txt", b"good \0 bad", r"a\.txt: byte 5 is not UTF-8 text \(0x00\)"),
        ("a.txt", b"", "holds no text; give"),
        ("a.jsonl", (ROW * 2 + "{broken\n" + ROW).encode(), r"a\.jsonl:3: the row is not JSON"),
        ("a.jsonl", (ROW + "[" * 100_000).encode(), r"a\.jsonl:2: the row is nested more than 64"),
        (
            "a.jsonl",
            (ROW + '{"other": 1}\n').encode(),
            r"a\.jsonl:2: .*'text' \(keys: other\).*--key",
        ),
        ("a.jsonl", (ROW + '{"text": 7}\n').encode(), r"a\.jsonl:2: .*it is int"),
        ("a.jsonl", (ROW + "[1]\n").encode(), r"a\.jsonl:2: the row is list, not an object"),
        ("a.jsonl", (ROW + '{"text": "\\ud800"}\n').encode(), r"a\.jsonl:2: .*half a character"),
        ("a.jsonl", ROW.encode() + b"\xc3(\n", r"a\.jsonl: byte 17 is not UTF-8"),
        ("a.txt.gz", b"not packed", r"a\.txt\.gz: cannot be read"),
        ("a.txt.gz", gzip.compress(b"x" * 9000, mtime=0)[:-9], r"a\.txt\.gz: cannot be read"),
        ("a.txt.zst", b"not packed", r"a\.txt\.zst: cannot be read"),
        ("a.jsonl.zst", PACK[".zst"](ROW.encode() * 900)[:-9], r"a\.jsonl\.zst: cannot be read"),
        (
            "a.jsonl.gz",
            gzip.compress(ROW.encode() + b"{", mtime=0),
            r"a\.jsonl\.gz:2: the row is not JSON",
        ),
    ],
)
def test_bad_text(tokenizer: Path, tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    refused(words, tmp_path / name, "--tokenizer", tokenizer, "--workers", 1, out=tmp_path / "out")


def test_a_row_far_into_a_file_has_its_line_number(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_kinds, "CHUNK_BYTES", 100)
    for line in (1, 2, 7, 8, 50, 99, 100):
        rows = [ROW] * 100
        rows[line - 1] = "{bad}\n"
        path = tmp_path / "a.jsonl"
        path.write_text("".join(rows))
        refused(rf"a\.jsonl:{line}: ", path, "--tokenizer", tokenizer, "--workers", 1,
                out=tmp_path / "out")  # fmt: skip


def test_a_worker_reports_a_mistake(
    tokenizer: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_kinds, "CHUNK_BYTES", 30_000)
    refused(r"image\.png: byte 0 is not UTF-8", text, "--tokenizer", tokenizer, "--workers", 2,
            out=tmp_path / "out")  # fmt: skip


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (290, r"its characters alone are (\d+)\); use \1 or more"),
        (99_999, r"it has fewer different pieces\); use (\d+) or fewer, or more text"),
    ],
)
def test_the_size_of_a_tokenizer_that_fits_is_named(
    tmp_path: Path, pieces: int, words: str
) -> None:
    texts = python_sources(1)
    with pytest.raises(DataError, match=words) as refusal:
        train_sentencepiece(texts, pieces, tmp_path / "t.model")
    named = re.search(words, str(refusal.value))
    assert named is not None
    train_sentencepiece(texts, int(named[1]), tmp_path / "t.model")


def test_nothing_there(tokenizer: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused("no such file or folder", tmp_path / "none", "--tokenizer", tokenizer, out=out)
    refused(r"holds no text in files like \*\.md; give", text, "--glob", "*.md",
            "--tokenizer", tokenizer, out=out)  # fmt: skip
    refused("no such tokenizer", text, "--tokenizer", tmp_path / "none", out=out)
    assert not out.exists()
    refused("cannot be made", text, "--tokenizer", tokenizer, out=text / "00.py")
    refused("no document is left .* smaller --validation", text / "00.py", "--validation",
            "0.999999", "--tokenizer", tokenizer, out=out)  # fmt: skip
    (text / "empty.jsonl").write_text('{"text": ""}')
    refused("no document is left for training; give more text$", text / "empty.jsonl",
            "--tokenizer", tokenizer, out=out)  # fmt: skip


@pytest.mark.parametrize(
    ("option", "words"), [("input", "an input is empty"), ("--tokenizer", "--tokenizer is empty"),
                          ("--out", "--out is empty")],
)  # fmt: skip
def test_an_empty_path_is_not_this_folder(
    tokenizer: Path, text: Path, tmp_path: Path, option: str, words: str
) -> None:
    given = {"input": str(text), "--tokenizer": str(tokenizer), "--out": str(tmp_path / "out")}
    source, *rest = {**given, option: ""}.items()
    with pytest.raises(DataError, match=words):
        main([source[1], *(word for pair in rest for word in pair)])


def test_a_pipe_is_no_text(tokenizer: Path, text: Path, tmp_path: Path) -> None:
    os.mkfifo(pipe := text / "pipe")
    refused("pipe: is neither a file nor a folder", pipe, "--tokenizer", tokenizer,
            out=tmp_path / "out")  # fmt: skip


def test_a_folder_that_cannot_be_listed_is_not_left_out(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (text / ".hidden").mkdir()
    (text / "loop").symlink_to(text)
    scandir = os.scandir
    locked: set[str] = set()

    def listed(path: str) -> object:  # chmod does not stop root
        if Path(path).name in locked:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", listed)
    locked.add(".hidden")
    ((*sources,),) = text_files.plan([text], ["*.py"])
    assert [source.path for source in sources] == [
        str(path) for path in sorted([*text.glob("[0-9]*.py"), *text.glob("deep/*.py")])
    ]
    locked.add("deep")
    with pytest.raises(DataError, match=r"deep: cannot be read \(Permission denied\)"):
        text_files.plan([text], ["*.py"])
    assert text_files.plan([text], ["*.py"], ["deep"])


def test_what_prepare_wrote_is_no_text(tokenizer: Path, text: Path) -> None:
    (text / "image.png").unlink()
    out = text / "deep" / "out"
    made = run(out, text, "--tokenizer", tokenizer)
    assert run(out, text, "--tokenizer", tokenizer) == made
    with pytest.raises(DataError, match="is both an input and --out; choose another --out"):
        run(text, text, "--tokenizer", tokenizer)


def test_another_dataset_is_not_overwritten(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    made = run(tmp_path / "out", text / "00.py", "--tokenizer", tokenizer)
    with pytest.raises(DataError, match="another dataset, with eos=True instead of False"):
        run(tmp_path / "out", text / "00.py", "--tokenizer", tokenizer, "--no-eos")
    with pytest.raises(DataError, match="dataset of other text"):
        run(tmp_path / "out", text / "02.py", "--tokenizer", tokenizer)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.is_file()} == made


@pytest.mark.parametrize(
    ("arg", "value"), [("--workers", "0"), ("--validation", "1"), ("--validation", "x"),
                       ("--train-tokenizer", "-3")],
)  # fmt: skip
def test_impossible_arguments(
    capsys: pytest.CaptureFixture[str], arg: str, value: str, tmp_path: Path
) -> None:
    args: Sequence[str] = ["x", "--out", str(tmp_path), arg, value]
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    assert f"argument {arg}: {value!r} is not" in capsys.readouterr().err


def test_a_full_disk_is_reported_in_bytes(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"no space left: about 12345 bytes needed, \d+ free"),
        chunks.disk_space(tmp_path, 12345),
        open("/dev/full", "wb", buffering=0) as file,
    ):
        file.write(b"x")
    with pytest.raises(FileNotFoundError), chunks.disk_space(tmp_path, 1):
        (tmp_path / "none").read_bytes()


def test_datasets_that_cannot_be_opened(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a dataset"):
        open_dataset(tmp_path)
    out = tmp_path / "out"
    run(out, text / "00.py", "--tokenizer", tokenizer)
    data = open_dataset(out)
    data.check_vocabulary(600)
    with pytest.raises(DataError, match=r"600 tokens, and model\.vocab_size=512 is fewer"):
        data.check_vocabulary(512)
    (out / "tokenizer.model").write_bytes(b"other")
    with pytest.raises(DataError, match=r"train\.tokens: was not made with .*tokenizer\.model"):
        open_dataset(out)
    (out / "tokenizer.model").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.model: is missing"):
        open_dataset(out)
