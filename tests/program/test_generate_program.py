"""``llamax generate`` as a user runs it: every kind of folder, ranks, and mistakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from support.models import DECIDED

from llamax.cli.generate import main
from llamax.cli.prepare import main as prepare
from llamax.config.schema import CheckpointConfig, Config, DataConfig, RunConfig
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.data.tokenizer.train import train_sentencepiece
from llamax.inference.engine import Speed
from llamax.inference.language_model import load as llamax_load
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.process import run_main
from llamax.train import train

VOCABULARY = 320
MODEL = replace(DECIDED, num_hidden_layers=2, vocab_size=VOCABULARY, max_position_embeddings=64)
TEXT = ["def main(argv):", "    return value + 1", "for each in range(10): print(each)"] * 20


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pieces of Python; everything else is bytes."""
    return train_sentencepiece(
        TEXT, VOCABULARY, tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    )


@pytest.fixture(scope="session")
def hub(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers saved, random weights, and the tokenizer."""
    folder = tmp_path_factory.mktemp("hub")
    transformers.set_seed(0)
    config = transformers.LlamaConfig(**MODEL.to_hub("float32"))
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def run(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step."""
    folder = tmp_path_factory.mktemp("run")
    data, corpus = folder / "data", folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    assert prepare([str(corpus), "--out", str(data), "--tokenizer", str(tokenizer)]) == 0
    train(
        Config(
            model=MODEL,
            data=DataConfig(path=str(data), sequence_length=16, global_batch=1, micro_batch=1),
            checkpoint=CheckpointConfig(),
            run=RunConfig(folder=str(folder / "run"), steps=1, progress="off"),
        ),
        Rendezvous(),
    )
    return folder / "run"


def llamax(*argv: object) -> int:
    return run_main(main, [str(word) for word in argv])


def test_a_single_prompt_is_continued_as_transformers_does(
    hub: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert llamax(hub, "--prompt", "def main", "--greedy", "--max-new-tokens", 20) == 0
    out, err = capsys.readouterr()
    reference = transformers.LlamaForCausalLM.from_pretrained(hub)
    pieces = load_tokenizer(tokenizer)
    ids = torch.tensor([[1, *pieces.encode("def main")]])
    made = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    assert out == pieces.decode(made[0].tolist()) + "\n"
    assert out.startswith("def main")
    assert "tokens/s" in err


def test_a_model_in_8_bits_says_what_it_takes_and_the_same_in_a_program(
    hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["--prompt", "def main", "--greedy", "--max-new-tokens", 9]
    assert llamax(hub, *how, "--quantize", "int8") == 0
    out, err = capsys.readouterr()
    assert "llamax: weights in int8: " in err
    small = llamax_load(hub, quantize="int8")
    assert out == "def main" + small.generate("def main", temperature=0, max_new_tokens=9) + "\n"
    dense = llamax_load(hub)
    near, exact = (model.logits("def main").float() for model in (small, dense))
    assert 0 < (near - exact).norm() < 0.05 * exact.norm()


def test_a_run_a_step_and_a_folder_made_from_it_say_the_same(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llamax.checkpoint.consolidate import consolidate

    made = []
    for place in (run, run / "checkpoints/step-00000001", consolidate(run, tmp_path / "hub")):
        assert llamax(place, "--prompt", "for", "--max-new-tokens", 12, "--seed", 3) == 0
        made.append(capsys.readouterr().out)
    assert made[0] == made[1] == made[2]


def test_several_prompts_come_under_headings_and_into_a_file(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plain.txt").write_text("한국어\n\nfor each\n", encoding="utf-8")
    (tmp_path / "p.csv").write_text("prompt\n한국어\nfor each\n", encoding="utf-8-sig")
    common = ["--prompt", "def", "--max-new-tokens", 9, "--temperature", 1.5]
    outputs = []
    for name, batch in (("plain.txt", 8), ("p.csv", 2)):
        out = tmp_path / f"{batch}.jsonl"
        files = ["--prompts-file", tmp_path / name, "--out", out, "--batch", batch]
        assert llamax(hub, *common, *files) == 0
        outputs.append((capsys.readouterr().out, out.read_text(encoding="utf-8")))
    assert outputs[0] == outputs[1], "how prompts are batched changes nothing"
    printed, written = outputs[0]
    records = [json.loads(line) for line in written.splitlines()]
    assert [record["prompt"] for record in records] == ["def", "한국어", "for each"]
    assert printed == "".join(
        f"=== {i} of 3 ===\n{record['prompt']}{record['text']}\n"
        for i, record in enumerate(records, 1)
    )
    assert all(record["new_tokens"] == 9 or record["ended"] == "stop" for record in records)


def test_stops(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [hub, "--prompt", "def", "--greedy", "--max-new-tokens", 40]
    assert llamax(*common, "--out", tmp_path / "free.jsonl") == 0
    free = json.loads((tmp_path / "free.jsonl").read_text())["text"]
    stop = free[10:13]
    assert llamax(*common, "--stop", stop, "--out", tmp_path / "cut.jsonl") == 0
    cut = json.loads((tmp_path / "cut.jsonl").read_text())
    assert cut["text"] == free[: free.index(stop)]
    assert cut["ended"] == "stop"
    every = [word for token in range(VOCABULARY) for word in ("--stop-id", token)]
    assert llamax(*common, *every, "--out", tmp_path / "none.jsonl") == 0
    none = json.loads((tmp_path / "none.jsonl").read_text())
    assert (none["text"], none["new_tokens"], none["ended"]) == ("", 1, "stop")
    assert capsys.readouterr().out.startswith(f"def{free}\ndef{cut['text']}\ndef\n")


def test_bos_is_the_models_and_may_be_left_out(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def prompt_tokens(*more: str) -> int:
        out = tmp_path / f"{len(more)}.jsonl"
        assert llamax(hub, "--prompt", "def", "--max-new-tokens", 1, "--out", out, *more) == 0
        return int(json.loads(out.read_text())["prompt_tokens"])

    assert prompt_tokens() == prompt_tokens("--no-bos") + 1
    assert llamax(hub, "--max-new-tokens", 3) == 0, "no prompt: the model starts a text"
    assert llamax(hub, "--max-new-tokens", 3, "--no-bos") == 2
    assert "prompt 1 has no tokens" in capsys.readouterr().err


def test_bfloat16_on_request(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [hub, "--prompt", "def", "--max-new-tokens", 3]
    assert llamax(*common, "--dtype", "bfloat16", "--threads", 1) == 0


def test_ranks_under_torchrun_generate_the_text_of_one_rank(
    hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(hub), "--prompt", "한 def", "--greedy", "--max-new-tokens", "20"]
    assert llamax(*options) == 0
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*ranks, "-m", "llamax.cli.generate", *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == capsys.readouterr().out


def test_speed() -> None:
    assert str(Speed(5, 0.25)) == "5 prompt tokens in 0.25 s"
    assert (
        str(Speed(5, 0.25, 30, 2.0))
        == "5 prompt tokens in 0.25 s, 30 more in 2.00 s: 15.0 tokens/s"
    )


# --- mistakes ------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that a mistake gets."""
    assert llamax(*argv) == 2
    out, err = capsys.readouterr()
    [line] = err.splitlines()
    assert line.startswith("llamax: ")
    assert out == ""
    return line


def test_models_that_are_none(
    hub: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is not on this machine" in refused(capsys, "meta-llama/Llama-2-7b-hf")
    assert "holds no model" in refused(capsys, tmp_path)
    half = tmp_path / "run/checkpoints/step-00000001"
    shutil.copytree(run / "checkpoints/step-00000001", half)
    (half / "done").unlink()
    assert "holds no model" in refused(capsys, tmp_path / "run")
    assert "has no file 'done'" in refused(capsys, half)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert "not a Llama" in refused(capsys, tmp_path)


def test_tokenizers_that_do_not_fit(
    hub: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = train_sentencepiece(TEXT, VOCABULARY + 1, tmp_path / "other.model")
    line = refused(capsys, hub, "--tokenizer", other)
    assert f"has {VOCABULARY + 1} ids but the model {VOCABULARY}" in line
    assert "no such tokenizer" in refused(capsys, hub, "--tokenizer", tmp_path / "absent")
    bare = tmp_path / "bare"
    shutil.copytree(hub, bare)
    (bare / "tokenizer.model").unlink()
    assert "holds no tokenizer" in refused(capsys, bare)

    moved = tmp_path / "step-00000001"
    shutil.copytree(run / "checkpoints/step-00000001", moved)
    given = ["--tokenizer", hub, "--max-new-tokens", 2]
    data = run.parent / "data"
    data.rename(run.parent / "elsewhere")
    try:
        assert "use --tokenizer PATH" in refused(capsys, run)
        assert llamax(run, *given) == 0
        capsys.readouterr()
        data.mkdir()
        train_sentencepiece(TEXT * 2, VOCABULARY - 1, data / "tokenizer.model")
        assert "is not the tokenizer that" in refused(capsys, run)
    finally:
        shutil.rmtree(data, ignore_errors=True)
        (run.parent / "elsewhere").rename(data)


def test_prompts_that_are_none(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def file(name: str, raw: bytes) -> list[object]:
        (tmp_path / name).write_bytes(raw)
        return [hub, "--prompts-file", tmp_path / name]

    assert "is not UTF-8 at byte 1" in refused(capsys, *file("latin.txt", b"a\xff"))
    assert "holds no prompts" in refused(capsys, *file("empty.txt", b"\n \n"))
    for raw in (b'{"text": "a"}', b'{"prompt": 1}'):
        assert 'is not {"prompt": "text"}' in refused(capsys, *file("p.jsonl", raw))
    assert "p.jsonl: row 1: is list, not an object" in refused(capsys, *file("p.jsonl", b"[1]"))
    assert "p.jsonl: row 1: is not JSON" in refused(capsys, *file("p.jsonl", b"{"))
    assert "cannot be read" in refused(capsys, hub, "--prompts-file", tmp_path / "absent")
    assert "is not UTF-8; retype" in refused(capsys, hub, "--prompt", "a\udcff")
    long = refused(capsys, hub, "--prompt", "def " * 20, "--max-new-tokens", 60)
    assert "max_position_embeddings=64" in long


def test_options_out_of_range(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--batch=0" in refused(capsys, hub, "--batch", 0)
    assert "--stop is empty" in refused(capsys, hub, "--stop", "")
    assert "--top-p=2.0" in refused(capsys, hub, "--top-p", 2)
    assert "--max-new-tokens=0" in refused(capsys, hub, "--max-new-tokens", 0)
    common = [hub, "--max-new-tokens", 2, "--out"]
    (tmp_path / "there.jsonl").write_text("keep")
    assert "exists already" in refused(capsys, *common, tmp_path / "there.jsonl")
    assert (tmp_path / "there.jsonl").read_text() == "keep"
    assert "cannot be written" in refused(capsys, *common, tmp_path / "no/folder.jsonl")


def test_a_world_that_does_not_divide_the_model(
    hub: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {"RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(key, value)
    line = refused(capsys, hub)
    assert "a world of 3 ranks does not divide model.num_attention_heads=4; use 1, 2 or 4" in line


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for option in ("--prompt", "--top-p", "--stop", "--out", "--tokenizer", "--seed"):
        assert option in text
