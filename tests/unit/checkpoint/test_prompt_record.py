"""Template, system text, fields and turn ends of training reach whatever reads the model."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import transformers
from support.instruction import llama3_tokenizer, prepare, write_rows
from support.models import tiny

from llamax.checkpoint.consolidate import consolidate
from llamax.checkpoint.hf_folder import open_source
from llamax.checkpoint.merge import merge
from llamax.checkpoint.prompt_record import prompt_of
from llamax.checkpoint.shard_hf import shard
from llamax.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    FinetuneConfig,
    OptimConfig,
    RunConfig,
)
from llamax.data.chat.record import PromptRecord, with_system
from llamax.data.dataset import open_dataset
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.inference.engine import open_model
from llamax.inference.evaluate import evaluate
from llamax.inference.generate import GenerationSettings, compare, format_prompts, generate
from llamax.inference.prompts import read_prompts
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import ConfigError
from llamax.runtime.hub_files import PROMPT_JSON
from llamax.tools.inspect.description import describe
from llamax.train import train

# Quotes, braces, a backslash, a line break and a character beyond the Basic Multilingual Plane.
SYSTEM = "Answer \"short\" & 'sweet': {{ x }} {% y %} \\n \n done 🙂."
ROWS = [{"Q": f"Repeat {i}: {i % 7}", "A": f"{i % 7}", "system": None} for i in range(20)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a run, a run of adapters, and what is exported of both."""
    home = tmp_path_factory.mktemp("record")
    tokenizer = llama3_tokenizer(home / "tokenizer")
    size = load_tokenizer(tokenizer).vocab_size
    rows = write_rows(home / "rows.jsonl", ROWS)
    prepare(home / "data", rows, "--template", "llama3-chat", "--system", SYSTEM, "--field",
            "instruction=Q", "--field", "answer=A", "--tokenizer", tokenizer,
            "--validation", "0")  # fmt: skip
    model = tiny(vocab_size=size, max_position_embeddings=512, bos_token_id=size - 7,
                 eos_token_id=size - 6)  # fmt: skip
    cfg = Config(
        model=model,
        optim=OptimConfig(lr=1e-3),
        data=DataConfig(path=str(home / "data"), sequence_length=256, global_batch=2),
        checkpoint=CheckpointConfig(),
        run=RunConfig(folder=str(home / "run"), steps=1, progress="off", threads=1),
    )
    train(cfg, Rendezvous())
    consolidate(home / "run", home / "whole")
    tuned = dataclasses.replace(
        cfg,
        checkpoint=CheckpointConfig(init_from=str(home / "whole")),
        finetune=FinetuneConfig(method="lora", r=2),
        run=dataclasses.replace(cfg.run, folder=str(home / "adapters")),
    )
    train(tuned, Rendezvous())
    consolidate(home / "adapters", home / "peft")
    merge(home / "adapters", home / "merged")
    shard(home / "whole", home / "cut", 2)
    return home


MODELS = ("run", "whole", "adapters", "peft", "merged", "cut")


def prompt_ids(folder: Path, tokenizer: Path, **settings: Any) -> list[list[int]]:
    rows = read_prompts(["Who?"], None, settings.get("template", ""))
    loaded = open_model(folder, str(tokenizer))
    return [
        prompt.ids
        for prompt in format_prompts(loaded, rows, GenerationSettings(**settings)).prompts
    ]


@pytest.mark.parametrize("model", MODELS)
def test_prompts_are_those_of_training_in_every_folder(home: Path, model: str) -> None:
    given = {"template": "llama3-chat", "system": SYSTEM}
    expected = prompt_ids(home / "whole", home / "tokenizer", **given)
    assert prompt_ids(home / model, home / "tokenizer") == expected
    plain = load_tokenizer(home / "tokenizer").encode("Who?")
    (ids,) = prompt_ids(home / model, home / "tokenizer", template="none")
    assert ids[1:] == plain
    for system in ("", "Other."):
        ids = prompt_ids(home / model, home / "tokenizer", system=system)
        assert ids != expected


@pytest.mark.parametrize("model", ["whole", "merged"])
def test_transformers_renders_what_was_trained_on(home: Path, model: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / model)
    file = open_dataset(home / "data").train
    edges = [int(edge) for edge in file.documents]
    samples = {tuple(file.tokens[a:b].astype(int)) for a, b in pairwise(edges)}
    for row in ROWS:
        messages = [
            {"role": "user", "content": row["Q"]},
            {"role": "assistant", "content": row["A"]},
        ]
        found = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tuple(tokenizer(found, add_special_tokens=False)["input_ids"])
        assert ids in samples
        with_own = [{"role": "system", "content": "Own."}, *messages]
        assert "Own." in (text := tokenizer.apply_chat_template(with_own, tokenize=False))
        assert "sweet" not in text
    config = json.loads((home / model / "generation_config.json").read_text())
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") in config["eos_token_id"]


def test_rows_are_read_by_the_columns_of_training(home: Path) -> None:
    numbers = evaluate(home / "merged", test_file=home / "rows.jsonl", limit=2, max_new_tokens=2)
    assert numbers["rows"] == 2
    settings = GenerationSettings(max_new_tokens=2)
    done = generate(home / "adapters", (), settings, prompts_file=home / "rows.jsonl")
    assert len(done) == len(ROWS)
    assert "Repeat 0" in done[0].prompt
    assert "sweet" in done[0].prompt
    with pytest.raises(ConfigError, match="needs `template`"):
        evaluate(home / "merged", test_file=home / "rows.jsonl", template="none")
    (pair,) = compare((home / "whole", home / "adapters"), ["Who?"], settings)
    assert "sweet" in pair.prompt.text


def test_a_checkpoint_needs_no_dataset_to_know_its_prompt(home: Path) -> None:
    source = open_source(home / "run")
    expected = prompt_of(open_source(home / "whole"))
    assert expected is not None
    assert expected.system == SYSTEM
    assert expected.fields == {"instruction": "Q", "answer": "A"}
    assert PromptRecord.of(source.state["prompt"]) == prompt_of(source) == expected
    source.state["prompt"]["system"] = "kept in the checkpoint"
    assert prompt_of(source) == dataclasses.replace(expected, system="kept in the checkpoint")
    del source.state["prompt"]  # as older checkpoints have it
    assert prompt_of(source) == expected


def test_text_data_has_no_record_and_a_damaged_one_is_none(home: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "import os"}] * 9)
    out = prepare(tmp_path / "data", rows, "--tokenizer", home / "tokenizer", "--validation", 0)
    assert open_dataset(out).prompt is None
    for value in (None, [], {"source": ""}, {"source": 3}, {"source": "x", "fields": 3}):
        assert PromptRecord.of(value) is None
    assert PromptRecord.of({"source": "x", "turn_ends": [1, "2"]}).turn_ends == (1,)  # type: ignore[union-attr]
    assert (home / "whole" / PROMPT_JSON).is_file()
    assert (home / "peft" / PROMPT_JSON).is_file()


@pytest.mark.parametrize(
    "source", ["\n{{ messages[0].content }}", "  {% if messages %}a{% endif %}"]
)
def test_a_system_text_changes_nothing_else_of_a_template(source: str) -> None:
    from llamax.data.chat.jinja_sandbox import Program

    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    before = Program(source, "a").render({"messages": messages})
    program = Program(with_system(source, "s"), "b")
    assert "messages" in program.variables
    assert program.render({"messages": messages[1:]}) == before
    assert program.render({"messages": messages}) == before
    assert with_system(source, "") == source


def test_a_special_token_in_the_system_text_stays_out_of_the_chat_template(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}] * 9)
    out = prepare(tmp_path / "data", rows, "--template", "llama3-chat", "--system", "<|eot_id|>",
                  "--tokenizer", home / "tokenizer", "--validation", 0)  # fmt: skip
    assert "set messages" not in (out / "chat_template.jinja").read_text()
    prompt = open_dataset(out).prompt
    assert prompt is not None
    assert prompt.system == "<|eot_id|>"
    assert "the system text has <|eot_id|> inside" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["run", "adapters"])
def test_inspect_shows_the_record_in_a_line(home: Path, model: str) -> None:
    assert dict(describe(home / model))["prompt"] == (
        f"template llama3-chat, system text {SYSTEM!r}, answer from A, instruction from Q"
    )
