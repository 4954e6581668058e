"""``llamax prepare`` on long documents: the ids of the whole, bounded memory, or one line."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from support.instruction import llama2_tokenizer
from support.packed import packed

from llamax.cli.prepare import main
from llamax.data.dataset import open_dataset
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.runtime import progress
from llamax.runtime.errors import DataError

LIMIT = 64 * 1024
LONG = "the river runs to the sea " * 4000  # 104,000 bytes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama2_tokenizer(tmp_path_factory.mktemp("t"))


def write(path: Path, text: str) -> Path:
    """A text as the kind of file that the name says."""
    name = path.name
    if name.startswith("rows.json"):
        text = json.dumps([{"text": "short"}, {"text": text}], indent=1)
    elif ".jsonl" in name:
        text = "".join(json.dumps({"text": each}) + "\n" for each in ("short", text))
    elif ".csv" in name:
        text = f'text\nshort\n"{text}"\n'
    elif name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist([{"text": "short"}, {"text": text}]), path)
        return path
    path.write_bytes(packed(name, text.encode()))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "rows.json", "a.csv", "a.parquet"])
def test_a_row_above_the_limit_is_refused_in_one_line(
    tmp_path: Path, tokenizer: Path, name: str
) -> None:
    path, out = write(tmp_path / name, LONG), tmp_path / "data"
    options = [str(path), "--tokenizer", str(tokenizer), "--out", str(out), "--workers", "1"]
    with pytest.raises(DataError, match=r"64 KiB; split it, or use a larger --max-document") as no:
        main([*options, "--max-document", "64KiB"])
    assert name in str(no.value)
    assert "\n" not in str(no.value)
    assert not (out / "dataset.json").exists()
    assert main([*options, "--max-document", "1MB"]) == 0
    expected = load_tokenizer(tokenizer).encode_documents([LONG])[0]
    assert open_dataset(out).train.tokens[-len(expected) - 1 : -1].tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_a_text_of_any_length_has_the_ids_of_the_whole(
    tmp_path: Path, tokenizer: Path, name: str
) -> None:
    text = LONG * 40  # 4 MB: several pieces
    path, out = write(tmp_path / name, text), tmp_path / "data"
    options = [str(path), "--tokenizer", str(tokenizer), "--out", str(out), "--workers", "1"]
    assert main([*options, "--max-document", "64KiB", "--bos", "--validation", "0"]) == 0
    data = open_dataset(out).train
    assert len(data.documents) == 2, "one document"
    assert data.header.text_bytes == len(text)
    expected = load_tokenizer(tokenizer).encode_documents([text])[0]
    assert data.tokens[1:-1].tolist() == expected.tolist()


def test_a_text_without_a_place_to_cut_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    path = write(tmp_path / "a.txt", "x" * 3_000_000)
    options = [str(path), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "data")]
    with pytest.raises(DataError, match=r"a\.txt: a document holds more than .* without a place"):
        main([*options, "--workers", "1", "--max-document", "64KiB"])


def test_a_sample_above_the_limit_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    row = {"instruction": "Why?", "output": "x " * 300_000}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    options = [str(path), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "data")]
    with pytest.raises(DataError, match=r"row 1: is a sample of more than .*larger --max-document"):
        main([*options, "--template", "dolly", "--workers", "1", "--max-document", "700KB"])


@pytest.mark.parametrize("value", ["0", "64 bananas", "-1", ""])
def test_a_size_that_is_none(
    tmp_path: Path, tokenizer: Path, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["a", "--tokenizer", str(tokenizer), "--out", "o", f"--max-document={value}"])
    assert "argument --max-document" in capsys.readouterr().err


def test_what_takes_long_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "FIRST_S", 0.0)
    monkeypatch.setattr(progress, "LEAST_S", 0.0)
    caplog.set_level(logging.INFO, "llamax")
    said = progress.threading.Event()
    monkeypatch.setattr(progress.logger, "info", lambda *words: said.set())
    with progress.reported("reading", 0.0):
        assert said.wait(300)


MEASURED = """
import re, sys
from llamax.cli.prepare import main
main(sys.argv[1:])
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_memory_does_not_grow_with_a_text(tmp_path: Path, tokenizer: Path, ending: str) -> None:
    peaks = []
    for megabytes in (5, 40):
        path = write(tmp_path / f"{megabytes}.txt{ending}", LONG * (10 * megabytes))
        out = tmp_path / str(megabytes)
        options = [str(path), "--tokenizer", str(tokenizer), "--out", str(out), "--workers", "1"]
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, *options],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] < 300, "MiB, of which Python and its packages are the most"
    assert peaks[1] - peaks[0] < 40
