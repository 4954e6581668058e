"""What the files of a folder say about generating: stops, BOS, sampling, and surplus tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from support.instruction import llama3_tokenizer, write_rows
from support.models import tiny

from llamax.checkpoint.consolidate import consolidate
from llamax.checkpoint.shard_hf import shard
from llamax.cli.prepare import main as prepare
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.inference.engine import open_model, split_stops
from llamax.inference.evaluate import evaluate
from llamax.inference.generate import GenerationSettings, generate
from llamax.inference.sampling import Sampling, sampling_of
from llamax.model.llama import Llama
from llamax.runtime.errors import ConfigError, DataError

SETTINGS = {"eos_token_id": [501, 504], "do_sample": True, "temperature": 0.6, "top_p": 0.9}


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A tiny model as transformers saves it, with the tokenizer of a Llama 3."""
    folder = llama3_tokenizer(tmp_path / "hub")
    size = load_tokenizer(folder).vocab_size
    config = tiny(vocab_size=size, bos_token_id=size - 7, eos_token_id=size - 6)
    transformers.set_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_hub("float32")))
    model.save_pretrained(folder)
    return folder


def greedy(hub: Path, **settings: object) -> int:
    """The number of new tokens of a greedy answer."""
    chosen = GenerationSettings(temperature=0.0, max_new_tokens=12, **settings)  # type: ignore[arg-type]
    (done,) = generate(hub, "import os", chosen)
    return done.new_tokens


def fourth_token(hub: Path) -> int:
    """A token that the greedy answer first has at its fourth place or later."""
    model = transformers.LlamaForCausalLM.from_pretrained(hub)
    ids = transformers.AutoTokenizer.from_pretrained(hub)("import os", return_tensors="pt")
    out = model.generate(
        **ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    new = out[0, ids["input_ids"].shape[1] :].tolist()
    return next(token for i, token in enumerate(new) if i >= 3 and token not in new[:i])


def test_all_ends_of_generation_config_are_read_and_kept(hub: Path, tmp_path: Path) -> None:
    longest = greedy(hub)
    stop = fourth_token(hub)
    path = hub / "generation_config.json"
    path.write_text(json.dumps({**SETTINGS, "eos_token_id": [1, stop], "pad_token_id": 3}))
    model = transformers.LlamaForCausalLM.from_pretrained(hub)
    ids = transformers.AutoTokenizer.from_pretrained(hub)("import os", return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert greedy(hub) == expected.shape[1] - ids["input_ids"].shape[1] < longest
    consolidate(shard(hub, tmp_path / "cut", 2), tmp_path / "whole", tokenizer=hub)
    kept = json.loads((tmp_path / "whole/generation_config.json").read_text())
    assert kept["eos_token_id"] == [1, stop]
    assert [kept[key] for key in ("do_sample", "temperature", "top_p", "pad_token_id")] == [
        True, 0.6, 0.9, 3,
    ]  # fmt: skip
    assert open_model(tmp_path / "whole").generation == kept


@pytest.mark.parametrize(
    ("generation", "sampling"),
    [
        ({}, Sampling(0.8)),
        (SETTINGS, Sampling(0.6, 0, 0.9)),
        ({"do_sample": True}, Sampling(1.0)),
        ({"do_sample": False}, Sampling(0.0)),
        ({"do_sample": True, "top_k": 50}, Sampling(1.0, 50)),
    ],
)
def test_sampling_of_a_folder_is_the_default(
    generation: dict[str, object], sampling: Sampling
) -> None:
    assert sampling_of(generation) == sampling
    assert sampling_of(generation, 0.5, 7, 0.4, 3) == Sampling(0.5, 7, 0.4, 3)


def test_sampling_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"generation_config.json: top_p is 'most'"):
        sampling_of({"top_p": "most"})


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**30, True])
@pytest.mark.parametrize("name", ["top_k", "top_p", "temperature"])
def test_sampling_by_a_number_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} is .*; use a number"):
        sampling_of({name: value})


def test_a_stop_text_that_is_a_special_token(hub: Path) -> None:
    longest, stop = greedy(hub), fourth_token(hub)
    eot = load_tokenizer(hub).special["<|eot_id|>"]
    model = transformers.LlamaForCausalLM.from_pretrained(hub)
    with torch.no_grad():  # so that the model makes <|eot_id|> where it made another token
        rows = model.lm_head.weight
        rows[[stop, eot]] = rows[[eot, stop]].clone()
    model.save_pretrained(hub)
    assert greedy(hub, stop=["<|eot_id|>"]) < longest == greedy(hub, stop=["<|end_of_text|>"])
    with pytest.raises(ConfigError, match=r"has the special token .* inside"):
        split_stops(load_tokenizer(hub), ["x<|eot_id|>"])


@pytest.mark.parametrize("adds", [True, False])
def test_a_prompt_begins_with_bos_where_the_tokenizer_adds_it(hub: Path, adds: bool) -> None:
    path = hub / "tokenizer.json"
    engine = json.loads(path.read_text())
    path.write_text(json.dumps(engine if adds else {**engine, "post_processor": None}))
    settings = GenerationSettings(max_new_tokens=1)
    (done,) = generate(hub, "import os", settings)
    theirs = transformers.AutoTokenizer.from_pretrained(hub)("import os")["input_ids"]
    assert done.prompt_tokens == len(theirs)
    (asked,) = generate(hub, "import os", GenerationSettings(max_new_tokens=1, bos=True))
    (without,) = generate(hub, "import os", GenerationSettings(max_new_tokens=1, bos=False))
    assert asked.prompt_tokens == without.prompt_tokens + 1


def test_an_added_token_without_a_row_of_the_model(hub: Path, tmp_path: Path) -> None:
    engine = tokenizers.Tokenizer.from_file(str(hub / "tokenizer.json"))
    engine.add_special_tokens(["[PAD]"])
    engine.save(str(hub / "tokenizer.json"))
    assert greedy(hub)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "import os " * 40}] * 20)
    for name, more in (("own", []), ("megatron", ["--format", "megatron", "--bos", "--eos"])):
        out = ["--out", str(tmp_path / name), "--workers", "1", "--validation", "0", *more]
        assert prepare([str(rows), "--tokenizer", str(hub), *out]) == 0
    own, prefix = (
        evaluate(hub, data=data, split="train", sequence_length=16, packing="concat")
        for data in (tmp_path / "own", tmp_path / "megatron")
    )
    assert own == prefix
    direct = evaluate(
        hub,
        data=next((tmp_path / "megatron").glob("*.idx")).with_suffix(""),
        split="train",
        sequence_length=16,
        packing="concat",
    )
    assert direct == own
    with pytest.raises(DataError, match="has no split validation; use `split` train"):
        evaluate(hub, data=tmp_path / "megatron", sequence_length=16)


def test_a_batch_is_no_larger_than_the_data(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "import os"}] * 5)
    out = ["--out", str(tmp_path / "data"), "--workers", "1", "--validation", "0"]
    assert prepare([str(rows), "--tokenizer", str(hub), *out]) == 0
    computed, loss = [], Llama.loss

    def spied(self: Llama, ids_BS: torch.Tensor, *more: Any, **named: Any) -> Any:
        computed.append(len(ids_BS))
        return loss(self, ids_BS, *more, **named)

    monkeypatch.setattr(Llama, "loss", spied)
    options: dict[str, Any] = {"data": tmp_path / "data", "split": "train", "sequence_length": 16}
    few = evaluate(hub, **options, batch=1)
    count = len(computed)
    many = evaluate(hub, **options, batch=1000)
    assert computed[count:] == [few["samples"]]
    assert many == pytest.approx(few)
