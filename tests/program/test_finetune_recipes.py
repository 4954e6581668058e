"""Every fine-tuning recipe at a tiny size: rows, training as its file says, an answer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from support.instruction import llama2_tokenizer, llama3_tokenizer, prepare, sums, write_rows

from llamax.cli.evaluate import main as evaluate
from llamax.cli.finetune_demo import rows
from llamax.cli.generate import main as generate
from llamax.config.load import dump_config, load_config, parse_config
from llamax.config.schema import Config
from llamax.config.toml import tomllib
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.process import run_main
from llamax.tools.monitor.run_folder import read_run
from llamax.train import train
from llamax.training.resolve import resolve, visible_samples

RECIPES = {
    "dolly-llama2-7b": "dolly",
    "dolly-llama3.1-8b": "dolly",
    "korean-chat-lora": "usr-bot",
    "korean-chat-qlora": "usr-bot",
    "korean-chat-qlora-24gb": "usr-bot",
    "news-llama3-8b-qlora": "human-assistant",
    "gsm8k-lora": "dolly",
}


def tiny(recipe: str, folder: Path, tokenizer: Path, vocabulary: int) -> Config:
    """The recipe with a small model, one rank, and short samples."""
    config = load_config(recipe)
    grouped = config.model.num_attention_heads // config.model.num_key_value_heads
    model = replace(
        config.model,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=max(1, 4 // grouped),
        head_dim=16,
        vocab_size=vocabulary,
        bos_token_id=None,
        eos_token_id=None,
    )
    hub = folder / "base"
    transformers.set_seed(0)
    shape = transformers.LlamaConfig(**model.to_hub("float32"))
    transformers.LlamaForCausalLM(shape).save_pretrained(hub)
    for path in tokenizer.parent.glob("tokenizer*"):
        (hub / path.name).write_bytes(path.read_bytes())
    return replace(
        config,
        model=model,
        parallel=replace(config.parallel, tensor=1),
        optim=replace(config.optim, lr=3e-3),
        data=replace(
            config.data,
            path=str(folder / "data"),
            sequence_length=128,
            micro_batch=1,
            global_batch=4,
        ),
        checkpoint=replace(config.checkpoint, init_from=str(hub)),
        run=replace(
            config.run,
            folder=str(folder / "run"),
            backend="cpu",
            tensorboard=False,
            progress="off",
            timeout_s=300,
            threads=1,
        ),
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs_at_a_tiny_size(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = RECIPES[recipe]
    if load_config(recipe).model.vocab_size > 100_000:
        tokenizer, vocabulary = llama3_tokenizer(tmp_path / "t") / "tokenizer.json", 507
    else:
        (tmp_path / "t").mkdir()
        tokenizer, vocabulary = llama2_tokenizer(tmp_path / "t"), 600
    table = write_rows(tmp_path / "rows.jsonl", sums(40, 12))
    prepare(tmp_path / "data", table, "--template", template, "--tokenizer", tokenizer,
            "--validation", "0.2")  # fmt: skip
    config = tiny(recipe, tmp_path, tokenizer, vocabulary)
    assert parse_config(tomllib.loads(dump_config(config))) == config
    train(config, Rendezvous())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    losses = [record["validation_loss"] for record in log if "validation_loss" in record]
    assert len(losses) == 3, "one for each epoch"
    assert losses[-1] < losses[0]
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 3
    capsys.readouterr()
    run, data = str(tmp_path / "run"), str(tmp_path / "data")
    assert run_main(evaluate, [run, "--data", data, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["loss"]
    exact = config.finetune.method != "qlora" and config.run.dtype == "float32"
    assert found == pytest.approx(losses[-1], rel=1e-4 if exact else 0.05)
    asked = ["--template", template, "--prompt", "Repeat 1: 1 2", "--max-new-tokens", "4"]
    assert run_main(generate, [run, *asked, "--greedy"]) == 0
    assert "Repeat 1: 1 2" in capsys.readouterr().out


def test_epochs_are_steps_and_a_run_may_end_early(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    tokenizer = llama2_tokenizer(tmp_path / "t")
    table = write_rows(tmp_path / "rows.jsonl", sums(48, 12))
    prepare(tmp_path / "data", table, "--template", "dolly", "--tokenizer", tokenizer,
            "--validation", "0.2")  # fmt: skip
    config = tiny("dolly-llama2-7b", tmp_path, tokenizer, 600)
    config = replace(config, run=replace(config.run, epochs=8, patience=2, dtype="float32"))
    hopeless = replace(config, optim=replace(config.optim, lr=1e-9, max_grad_norm=1e-9))
    hopeless = replace(hopeless, checkpoint=replace(config.checkpoint, keep=0))
    train(hopeless, Rendezvous())
    resolved = load_config(str(tmp_path / "run" / "config.toml"))
    assert resolved.run.epochs == 0
    assert resolve(hopeless, 1, *visible_samples(hopeless)).config == resolved, "as plan sees it"
    assert resolved.optim.warmup_steps == -(-3 * resolved.run.steps // 100)
    records = (tmp_path / "run" / "metrics.jsonl").read_text()
    steps = [json.loads(line)["step"] for line in records.splitlines()]
    assert steps[-1] < resolved.run.steps, "nothing got better, so it ended"
    assert read_run(tmp_path / "run").state == "finished"
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    told = [json.loads((each / "manifest.json").read_text())["state"] for each in checkpoints]
    waited = [state["validations_waited"] for state in told]
    assert waited == [0, 1, 2][: len(waited)] or waited[-1] == 2
    train(hopeless, Rendezvous())
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == records, "over stays over"


def test_the_rows_of_the_demo_can_be_learnt() -> None:
    table = list(rows(400))
    assert sum(bool(row["context"]) for row in table) == 200
    known = {(row["instruction"], row["context"]): row["response"] for row in table}
    assert all(known[row["instruction"], row["context"]] == row["response"] for row in table)
    assert known["Which day comes after Sunday?", ""] == "Monday."
