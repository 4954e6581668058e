"""``llamax inspect DATA --sample N``, judged by the loader, and its text by transformers."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from support.instruction import ROWS, llama2_tokenizer, llama3_tokenizer, prepare, sums, write_rows
from support.megatron import write_dataset
from support.tiny_run import config

from llamax.cli import inspect as program
from llamax.config.load import dump_config
from llamax.config.schema import DataConfig
from llamax.data.dataset import open_dataset
from llamax.data.header import Header
from llamax.data.samples import Samples
from llamax.data.token_file import TokenFile, TokenWriter
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.ops import IGNORE_INDEX
from llamax.parallel.mesh import ALONE
from llamax.runtime.errors import ConfigError, DataError
from llamax.runtime.process import run_main
from llamax.tools.inspect.description import describe
from llamax.tools.inspect.samples import Shown, pieces_of, read_samples
from llamax.tools.inspect.show import show_samples


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``chat`` (instruction data), ``text`` and the tokenizer ``llama3``."""
    folder = tmp_path_factory.mktemp("samples")
    tokenizer = llama3_tokenizer(folder / "llama3")
    table = write_rows(folder / "rows.jsonl", [*ROWS[:3], *sums(30)])
    prepare(folder / "chat", table, "--template", "llama3-chat", "--tokenizer", tokenizer)
    (folder / "lines.txt").write_text(
        "\n".join(f"# straße {i}\nnumber({i * 7})" for i in range(90))
    )
    prepare(folder / "text", folder / "lines.txt", "--tokenizer", tokenizer, "--validation", "0.2")
    return folder


def text_of(shown: Shown) -> str:
    return "".join(piece.text for part in shown.parts for piece in part.pieces)


@pytest.mark.parametrize(("name", "length"), [("chat", 64), ("chat", 4096), ("text", 50)])
@pytest.mark.parametrize("seed", [None, 3])
def test_samples_are_those_of_training(
    made: Path, name: str, length: int, seed: int | None
) -> None:
    """Ids, learnt tokens and documents are those of the loader, text that of transformers."""
    judge = transformers.AutoTokenizer.from_pretrained(made / "llama3")
    samples = Samples(
        open_dataset(made / name).train, DataConfig(sequence_length=length), seed or 0
    )
    loader = samples.loader(ALONE, 0, shuffle=seed is not None)
    shown = read_samples(made / name, 4, length=length, seed=seed)
    assert len(shown) == min(4, len(samples))
    for place, sample in enumerate(shown):
        at = place if seed is not None else sample.number
        (batch,) = loader.at(at)
        assert batch.documents is not None
        ids, labels = batch.ids[0].tolist(), batch.labels[0].tolist()
        first = 0
        for number, part in enumerate(sample.parts):
            size = len(part.ids) - 1
            if name == "text" and number < len(sample.parts) - 1:
                size += 1  # its last token is an input too
            here = slice(first, first + size)
            assert set(batch.documents[0, here].tolist()) == {number}
            assert ids[here] == [*part.ids[:size]]
            learnt = [label != IGNORE_INDEX for label in labels[here]]
            assert learnt[: len(part.ids) - 1] == [*part.learnt[1:]]
            assert not part.learnt[0]
            first += size
            text = "".join(piece.text for piece in part.pieces)
            assert text == judge.decode(part.ids, skip_special_tokens=False)
    spread = [sample.number for sample in read_samples(made / name, 2, length=length)]
    assert spread == [0, len(samples) // 2][: len(samples)]


def test_the_answers_of_a_conversation_are_marked(made: Path) -> None:
    for shown in read_samples(made / "chat", 9, length=4096):
        for part in shown.parts:
            names = [piece.text for piece in part.pieces if piece.special]
            assert names[0] == "<|begin_of_text|>"
            learnt = "".join(piece.text for piece in part.pieces if piece.learnt)
            answers = {row["response"] for row in [*ROWS, *sums(30)]}
            assert learnt.endswith("<|eot_id|>")
            assert learnt.removesuffix("<|eot_id|>") in {answer.strip() for answer in answers}


def test_a_sentencepiece_text_keeps_its_spaces_and_its_bytes(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(llama2_tokenizer(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    text = "def f(x):\n    return '이름 🙂'  # half ½"
    ids = tokenizer.encode(text)
    for learnt_from in range(0, len(ids), 5):
        learnt = [i >= learnt_from for i in range(len(ids))]
        pieces = [*pieces_of([1, *ids, 2, *ids, 99999], [False, *learnt, True] + learnt + [True],
                             tokenizer)]  # fmt: skip
        shown = "".join(piece.text for piece in pieces)
        # the second text follows a special token: its space is a token, and is not dropped
        assert shown == f"<s>{text}</s> {text}<99999>"
        assert "�" not in shown
    judge = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    assert judge.decode(ids, skip_special_tokens=True).strip() == text


def test_marks_and_colours(made: Path) -> None:
    (shown,) = read_samples(made / "chat", 1, length=4096)
    plain = show_samples([shown], marks=("[[", "]]"))
    legend, _, head, *rest = plain.splitlines()
    assert legend == "[[learnt]], not learnt"
    assert head.startswith(
        f"sample 1 of {shown.total} in {made / 'chat/train.tokens'}, best-fit at"
    )
    assert head.endswith(f"{shown.tokens:,} tokens, {shown.learnt} learnt")
    assert sum(line.startswith("-- document ") for line in rest) == len(shown.parts)
    assert "<|start_header_id|>assistant<|end_header_id|>\n\n[[Shakespeare.<|eot_id|>]]" in plain
    coloured = show_samples([shown], colour=True)
    assert "\x1b[32;1mShakespeare.\x1b[0m\x1b[32;1;36m<|eot_id|>\x1b[0m" in coloured
    assert "[[" not in coloured
    # each line by itself
    assert all(line.count("\x1b[") % 2 == 0 for line in coloured.splitlines())


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "colour"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_colours_are_for_terminals_that_allow_them(
    made: Path, environment: dict[str, str], colour: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", stream := Terminal())
    assert program.main([str(made / "chat"), "--sample", "1"]) == 0
    assert ("\x1b[" in stream.getvalue()) == colour
    assert ("⟦" in stream.getvalue()) != colour
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert program.main([str(made / "chat"), "--sample", "1"]) == 0
    ascii_only.seek(0)
    assert ascii_only.read().startswith("[[learnt]], not learnt")


def test_no_control_character_reaches_a_terminal(made: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(made / "llama3")
    (tmp_path / "evil.txt").write_text("a\x1b]0;title\x07b\x9b2Jc\u202ed")
    prepare(tmp_path / "evil", tmp_path / "evil.txt", "--tokenizer", made / "llama3",
            "--validation", "0")  # fmt: skip
    text = show_samples(read_samples(tmp_path / "evil", 1))
    assert "a\\x1b]0;title\\x07b\\x9b2Jc\\u202ed" in text
    assert tokenizer.special
    coloured = show_samples(read_samples(tmp_path / "evil", 1), colour=True)
    assert "\x1b]" not in coloured
    assert "\x07" not in coloured


def test_files_splits_blends_and_runs(made: Path, tmp_path: Path) -> None:
    every = read_samples(made / "text", 99, split="validation", length=50)
    assert every[0].file == made / "text/validation.tokens"
    assert [s.number for s in every] == [*range(len(every))], "no more than there are"
    assert text_of(read_samples(made / "text/validation.tokens", 1, length=50)[0]) == text_of(
        every[0]
    )
    blend = f"0.75 {made / 'text'} 0.25 {made / 'chat'}"
    files = [s.file.parent.name for s in read_samples(blend, 8, length=50)]
    assert sorted(files) == ["chat"] * 2 + ["text"] * 6
    first = read_samples(blend, 3, length=50, seed=1)
    assert {s.how.split()[0] for s in first} <= {"concat", "best-fit"}
    # a run: its dataset, length, packing and seed
    step = tmp_path / "run/checkpoints/step-00000001"
    step.mkdir(parents=True)
    (step / "done").touch()
    (step / "manifest.json").touch()
    cfg = config(made / "text", tmp_path / "run")
    (step / "config.toml").write_text(dump_config(cfg))
    wanted = read_samples(made / "text", 2, length=cfg.data.sequence_length, seed=cfg.run.seed)
    assert read_samples(tmp_path / "run", 2) == wanted
    assert read_samples(step, 2)[0].parts == wanted[0].parts
    (step / "config.toml").unlink()
    rows = [*describe(blend)]
    assert [value for label, value in rows if label == "weight"] == ["0.75", "0.25"]
    assert [value for label, value in rows if label == "dataset"] == [made / "text", made / "chat"]
    with pytest.raises(DataError, match=r"keeps no configuration that names its data; give the d"):
        read_samples(tmp_path / "run", 1)


def test_megatron_data_is_shown_with_a_tokenizer(made: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(made / "llama3")
    texts = ["first line", "second"]
    prefix = write_dataset(tmp_path / "d_document", [[*tokenizer.encode(t)] for t in texts])
    with pytest.raises(
        DataError, match=r"d_document: names no tokenizer.*give it with `tokenizer`"
    ):
        read_samples(prefix, 1)
    for path in (prefix, f"{prefix}.bin", f"{prefix}.idx"):
        (shown,) = read_samples(path, 1, tokenizer=made / "llama3", length=100)
        assert ["".join(piece.text for piece in part.pieces) for part in shown.parts] == texts


def test_what_cannot_be_shown_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*argv: object) -> str:
        assert run_main(program.main, [*map(str, argv)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "--sample=-1 is out of range; use 1 or more" in refused(made / "text", "--sample=-1")
    line = refused(made / "text", "--sample=1", "--split=tests")
    assert line.endswith("has no split tests; use --split train, validation")
    other = llama2_tokenizer(tmp_path)
    assert "was made with" in refused(made / "text", "--sample=1", f"--tokenizer={other}")
    assert "is not a dataset" in refused(tmp_path / "nothing", "--sample=1")
    with pytest.raises(ConfigError, match=r"`length=0` is out of range"):
        read_samples(made / "text", 1, length=-1)


def test_damage_is_found_before_it_is_shown(made: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((made / "text/tokenizer.json").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    path = tmp_path / "train.tokens"
    with TokenWriter(path, Header(tokenizer.fingerprint, tokenizer.vocab_size)) as writer:
        writer.add(np.arange(50, dtype=np.uint16), np.array([50]), 50)
    described: dict[str, Any] = {"tokenizer_file": "tokenizer.json"}
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    assert read_samples(path, 1)
    data = bytearray(path.read_bytes())
    start, _ = TokenFile(path, "off").header.sections["tokens"]
    data[start + 5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"do not match their checksum"):
        read_samples(path, 1)
