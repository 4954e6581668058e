"""``llamax evaluate``, and ``llamax generate`` for tuned models, as a user runs them."""

from __future__ import annotations

import json
import math
import shutil
import unicodedata
from dataclasses import replace
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.documented import documented
from support.instruction import llama2_tokenizer, prepare, sums, write_rows
from support.models import DECIDED as MODEL

import llamax
from llamax.cli.evaluate import main as evaluate
from llamax.cli.generate import main as generate
from llamax.cli.serve import main as serve
from llamax.data.chat.encode import Encoder
from llamax.data.chat.templates import BUILT_IN, make_sample
from llamax.data.dataset import open_dataset
from llamax.data.token_file import TokenWriter
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.inference.generate import new_file, write_line
from llamax.inference.side_by_side import columns
from llamax.runtime.errors import BackendError, ConfigError, DataError
from llamax.runtime.process import Main, run_main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hub: random weights; other: others; rows.jsonl, and data made of it."""
    folder = tmp_path_factory.mktemp("answers")
    tokenizer = llama2_tokenizer(folder)
    for seed, name in enumerate(("hub", "other")):
        transformers.set_seed(seed)
        config = transformers.LlamaConfig(**MODEL.to_hub("float32"))
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
        (folder / name / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    table = write_rows(folder / "rows.jsonl", sums(30, 20))
    prepare(folder / "data", table, "--template", "dolly", "--tokenizer", tokenizer,
            "--validation", "0.3")  # fmt: skip
    return folder


def found(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, float]:
    assert run_main(evaluate, [*map(str, argv), "--json"]) == 0
    answer: dict[str, float] = json.loads(capsys.readouterr().out)
    assert answer.keys() <= documented("llamax evaluate MODEL")
    return answer


@pytest.mark.parametrize("packing", ["best-fit", "padded", "concat"])
def test_loss_is_that_of_transformers(
    folder: Path, capsys: pytest.CaptureFixture[str], packing: str
) -> None:
    reference = transformers.LlamaForCausalLM.from_pretrained(folder / "hub")
    file = open_dataset(folder / "data").validation
    total, tokens = 0.0, 0
    edges = file.documents.astype(int).tolist()
    for start, stop in pairwise(edges):
        ids = torch.from_numpy(file.tokens[start:stop].astype(np.int64))[None]
        labels = ids.masked_fill(~torch.from_numpy(file.counted(np.arange(start, stop))), -100)
        count = int((labels[0, 1:] != -100).sum())
        total += reference(ids, labels=labels).loss.item() * count
        tokens += count
    packed = ("--packing", packing, "--sequence-length", 128, "--batch", 2)
    said = found(capsys, folder / "hub", "--data", folder / "data", *packed)
    if packing == "concat":  # a document may be cut, then its second half sees no first
        assert said["tokens"] == tokens
        return
    assert said["tokens"] == tokens
    first = found(capsys, folder / "hub", "--data", folder / "data", *packed, "--batches", 1)
    assert first["samples"] == min(2, said["samples"])
    assert said["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert said["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)


def test_answers_are_scored(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The right answers to the first rows are what the model says itself."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()[:4]]
    questions = write_rows(tmp_path / "questions.jsonl", rows)
    out = tmp_path / "said.jsonl"
    asked = ["--template", "dolly", "--max-new-tokens", 8]
    argv = [folder / "hub", "--prompts-file", questions, *asked, "--greedy", "--out", out]
    assert run_main(generate, list(map(str, argv))) == 0
    said = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["instruction"] for one in said] == [row["instruction"] for row in rows]
    some = tmp_path / "some.jsonl"
    assert run_main(generate, list(map(str, [*argv[:-1], some, "--limit", 3]))) == 0
    assert [json.loads(line) for line in some.read_text().splitlines()] == said[:3]
    for row, one in zip(rows, said, strict=True):
        assert one["prompt"] == f"### Instruction\n{row['instruction']}\n\n### Answer\n"
    rows = [{**row, "response": one["text"]} for row, one in zip(rows, said, strict=True)]
    rows[0]["response"] += " wrong"
    assert all(row["response"].strip() for row in rows), "a fixture for others"
    table = write_rows(tmp_path / "rows.jsonl", rows)
    capsys.readouterr()
    scored = tmp_path / "scored.jsonl"
    into = ("--out", scored, "--batch", 3)
    score = found(capsys, folder / "hub", "--test-file", table, *asked, *into)
    assert score["rows"] == 4
    assert score["exact_match"] == 0.75
    assert 0.75 < score["rouge_l"] < 1
    told = [json.loads(line) for line in scored.read_text().splitlines()]
    assert [one["exact_match"] for one in told] == [False, True, True, True]


def test_prompts_are_those_of_training(folder: Path) -> None:
    from llamax.inference.prompts import PromptFormat

    tokenizer = load_tokenizer(folder / "hub")
    for name in ("dolly", "alpaca", "usr-bot", "human-assistant", "llama2-chat"):
        encoder = Encoder(tokenizer)
        template = encoder.template(name, BUILT_IN[name])
        (trained,) = encoder.encode([template.spans(make_sample("Who?", "A cat.", "It is I"))])
        asked = PromptFormat(tokenizer, 1, name, context="A cat.").prompt({"instruction": "Who?"})
        assert trained.ids[~trained.counted].tolist() == asked.ids
    assert PromptFormat(tokenizer, 1, "llama2-chat").stop_ids == {2}


@pytest.mark.parametrize("name", ["dolly", "usr-bot"])
def test_a_conversation_has_the_template_of_training(
    folder: Path, tmp_path: Path, name: str
) -> None:
    """And not that of the base, whose folder has one: the prompt is that of the same question."""
    given = ("--template", name, "--tokenizer", folder / "hub", "--validation", "0")
    prepare(tmp_path / "data", folder / "rows.jsonl", *given)
    record = json.loads((tmp_path / "data" / "dataset.json").read_text())["prompt"]
    shutil.copytree(folder / "hub", tmp_path / "tuned")
    (tmp_path / "tuned" / "llamax_prompt.json").write_text(json.dumps(record))
    of_the_base = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    (tmp_path / "tuned" / "chat_template.jinja").write_text(of_the_base)
    model = llamax.load(tmp_path / "tuned")
    asked: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0}
    user = {"role": "user", "content": "Who?"}
    expected = model.generate({"instruction": "Who?"}, **asked)
    assert model.generate([user], **asked) == expected
    said = tmp_path / "said.jsonl"
    table = write_rows(tmp_path / "asked.jsonl", [{"messages": [user]}])
    argv = [tmp_path / "tuned", "--prompts-file", table, "--greedy", "--out", said]
    assert run_main(generate, [*map(str, argv), "--max-new-tokens", "12"]) == 0
    answer = json.loads(said.read_text())
    assert (answer["messages"], answer["text"]) == ([user], expected)
    assert model.generate("<user>Who?<answer>", template="none", **asked) != expected
    if name == "dolly":  # it holds one question
        with pytest.raises(DataError, match="is a conversation, which this template cannot read"):
            model.generate([user, {"role": "assistant", "content": "I"}, user], **asked)
    else:
        expected = model.generate({"instruction": "Who?", "system": "Be brief."}, **asked)
        system = {"role": "system", "content": "Be brief."}
        assert model.generate([system, user], **asked) == expected


def test_context_and_comparison(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "compared.jsonl"
    argv = ["--compare", f"{folder / 'hub'},{folder / 'other'}", "--prompt", "Who?", "--template",
            "dolly", "--context", "철수", "--max-new-tokens", 9, "--greedy",
            "--out", out]  # fmt: skip
    assert run_main(generate, list(map(str, argv))) == 0
    said = capsys.readouterr().out
    assert "### Context\n철수\n" in said
    told = json.loads(out.read_text())
    assert told["base"]["text"] != told["tuned"]["text"]
    for name in ("base", "tuned"):
        assert told[name]["new_tokens"] == 9
        alone = tmp_path / f"{name}.jsonl"
        model = folder / {"base": "hub", "tuned": "other"}[name]
        one = [model, *argv[2:-1], alone]
        assert run_main(generate, list(map(str, one))) == 0
        assert json.loads(alone.read_text())["text"] == told[name]["text"]


def test_three_models_are_compared(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub, other, out = folder / "hub", folder / "other", tmp_path / "out.jsonl"
    argv = ["--compare", f"{hub},{other},{hub}", "--prompt", "Who?", "--template", "dolly",
            "--greedy", "--max-new-tokens", "4", "--out", out]  # fmt: skip
    assert run_main(generate, list(map(str, argv))) == 0
    said = capsys.readouterr().out
    assert max(line.count(" | ") for line in said.splitlines()) == 2
    told = json.loads(out.read_text())
    assert told["base"]["text"] == told["tuned2"]["text"] != told["tuned1"]["text"]
    with pytest.raises(ConfigError, match="`compare` takes two models or more; found 1"):
        llamax.compare([hub], "Who?")


def test_a_base_is_for_the_adapters_of_a_comparison(folder: Path, tmp_path: Path) -> None:
    hub, adapter, out = folder / "hub", tmp_path / "adapter", tmp_path / "out.jsonl"
    adapter.mkdir()
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 64, "base_model_name_or_path": "gone"}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    q_proj, width = "base_model.model.model.layers.0.self_attn.q_proj", MODEL.hidden_size
    drawn = torch.Generator().manual_seed(0)
    factors = {
        f"{q_proj}.lora_A.weight": torch.randn(2, width, generator=drawn),
        f"{q_proj}.lora_B.weight": torch.randn(width, 2, generator=drawn),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    argv = ["--compare", f"{hub},{adapter}", "--base", hub, "--prompt", "Who?", "--greedy",
            "--max-new-tokens", 9, "--out", out]  # fmt: skip
    assert run_main(generate, list(map(str, argv))) == 0
    told = json.loads(out.read_text())
    assert told["base"]["text"] != told["tuned"]["text"]


def test_what_rows_hold_is_written_whatever_it_is(tmp_path: Path) -> None:
    with new_file(tmp_path / "out.jsonl") as out:
        write_line(out, {"when": date(2026, 1, 2), "half": "\ud800", "name": "철수"})
    text = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert json.loads(text) == {"when": "2026-01-02", "half": "\ud800", "name": "철수"}
    assert "철수" in text


def test_columns_are_straight_for_wide_letters() -> None:
    assert columns("ab\ncdefg", "x", width=4) == "ab   | x\ncdef |\ng    |"
    assert columns("철수다", "y\nz", width=5) == "철수  | y\n다    | z"
    first, second, third = (unicodedata.normalize("NFD", syllable) for syllable in "철수다")
    straight = f"{first}{second}  | e\u0301\n{third}    | z"  # as macOS writes names of files
    assert columns(f"{first}{second}{third}", "e\u0301\nz", width=5) == straight


def refused(capsys: pytest.CaptureFixture[str], main: Main, *argv: object) -> str:
    assert run_main(main, list(map(str, argv))) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_mistakes_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub, data, rows = folder / "hub", folder / "data", folder / "rows.jsonl"
    assert "give --data DATASET" in refused(capsys, evaluate, hub)
    assert "needs --template" in refused(capsys, evaluate, hub, "--test-file", rows)
    assert "use --split train, validation" in refused(
        capsys, evaluate, hub, "--data", data, "--split", "test"
    )
    for name, least in {"batch": 1, "batches": 0, "limit": 0, "threads": 0}.items():
        line = refused(capsys, evaluate, hub, "--data", data, f"--{name}", least - 1)
        assert f"--{name}={least - 1} is out of range; use {least} or more" in line
    assert "--stop is empty" in refused(capsys, evaluate, hub, "--data", data, "--stop", "")
    assert "needs no --base" in refused(capsys, evaluate, hub, "--data", data, "--base", hub)
    long = refused(capsys, evaluate, hub, "--data", data, "--sequence-length", 256)
    assert "--sequence-length=256 is beyond max_position_embeddings=128" in long
    other = tmp_path / "t"
    other.mkdir()
    llama2_tokenizer(other, 500)
    line = refused(capsys, evaluate, hub, "--data", data, "--tokenizer", other)
    assert "prepare the data with that one" in line
    empty = write_rows(tmp_path / "empty.jsonl", [{"question": "Q", "answer": ""}])
    line = refused(capsys, evaluate, hub, "--test-file", empty, "--template", "dolly")
    assert line.endswith("empty.jsonl: row 1: has an empty answer; correct or remove it")
    assert "give one model" in refused(capsys, generate, "--prompt", "a")
    assert "names one model; use BASE,TUNED" in refused(capsys, generate, "--compare", hub)
    pair = ("--compare", f"{hub},{folder / 'other'}", "--base", hub)
    assert "needs no --base" in refused(capsys, generate, *pair)
    assert "give --template too" in refused(capsys, generate, hub, "--context", "c")
    dolly = ("--template", "dolly")
    assert "give --prompt or --prompts-file" in refused(capsys, generate, hub, *dolly)
    for main, given in ((generate, ("--prompt", "Q")), (evaluate, ("--test-file", rows))):
        line = refused(capsys, main, hub, *dolly, *given, "--system", "Be short.")
        assert "--system: template dolly reads neither messages nor system" in line
    line = refused(capsys, generate, hub, "--template", "dolly", "--prompts-file", empty, "--field",
                   "instruction=Q")  # fmt: skip
    assert "row 1: has no field for the instruction (looked for Q; found question, answer)" in line


def test_a_split_without_a_label_is_refused_before_the_model_is_loaded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answers lie beyond the first samples, or nowhere; its loss would be 0 / 0."""
    (hub := tmp_path / "hub").mkdir()
    for name in ("config.json", "tokenizer.model", "model.safetensors"):
        (hub / name).write_bytes((folder / "hub" / name).read_bytes())
    size = (hub / "model.safetensors").stat().st_size
    with open(hub / "model.safetensors", "r+b") as file:  # weights that nobody may read
        file.seek(size // 2)
        file.write(b"\xff" * (size // 2))
    data = folder / "data"
    header = open_dataset(data).train.header
    for answers, place, remedy in (
        (0, "it", "set --labels=all, or prepare rows with answers"),
        (1, "its first batch", "raise --batches"),
    ):
        with TokenWriter(data / "odd.tokens", replace(header, sections={})) as writer:
            for number in range(12):
                counted = np.full(33, number >= 12 - answers)
                writer.add(np.arange(33), np.array([33]), 33, counted)
        given = (evaluate, hub, "--data", data, "--split", "odd", "--sequence-length", 32)
        line = refused(capsys, *given, "--packing", "concat", "--batches", 1, "--batch", 2)
        assert f"odd.tokens: no token of {place} counts in the loss; {remedy}" in line
    (data / "odd.tokens").unlink()


@pytest.mark.parametrize(
    ("main", "more"),
    [
        (generate, ("--prompt", "Q")),
        (evaluate, ("--test-file", "rows.jsonl", "--template", "dolly", "--max-new-tokens", "8")),
        (serve, ("--port", "0")),
    ],
)
def test_messages_name_the_options_of_the_command(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    main: Main,
    more: tuple[str, ...],
) -> None:
    """Not the settings of a run, which it does not have."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    line = refused(capsys, main, "hub", *more, "--backend", "cuda")
    assert "--backend=cuda: " in line
    assert line.endswith("use --backend=cpu")
    line = refused(capsys, main, "hub", *more, "--backend", "neuron")
    assert "--backend=neuron needs TorchNeuron" in line
    if main is not serve:
        for name, value in {"RANK": "0", "WORLD_SIZE": "3"}.items():
            monkeypatch.setenv(name, value)
        line = refused(capsys, main, "hub", *more)
        assert "a world of 3 ranks does not divide" in line
        assert "parallel." not in line


def test_a_device_that_is_not_there_is_named_as_it_was_given(folder: Path) -> None:
    with pytest.raises(BackendError, match=r"^`device=neuron` cannot be used .* device neuron"):
        llamax.load(folder / "hub", device="neuron")


def test_weights_that_are_not_finite_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not a loss of NaN without a reason."""
    (hub := tmp_path / "hub").mkdir()
    for name in ("config.json", "tokenizer.model"):
        (hub / name).write_bytes((folder / "hub" / name).read_bytes())
    weights = load_file(folder / "hub" / "model.safetensors")
    spoilt = {**weights, "model.norm.weight": weights["model.norm.weight"] * math.nan}
    save_file(spoilt, hub / "model.safetensors")
    for main, given in ((evaluate, ("--data", folder / "data")), (generate, ("--prompt", "Q"))):
        assert run_main(main, [str(hub), *map(str, given)]) != 0
        out, err = capsys.readouterr()
        assert err.splitlines()[-1] == (
            "llamax: the model's logits are not finite: its training diverged or its weights are "
            "damaged; use an earlier checkpoint"
        )
        assert "nan" not in out
