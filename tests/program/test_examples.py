"""Every example trains at a tiny size: made-up data in the real one's shape, random weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from support.corpora import python_sources
from support.example_scripts import EXAMPLES, script
from support.instruction import llama2_tokenizer, llama3_tokenizer, prepare, write_rows

from llamax.__main__ import COMMANDS
from llamax.config.load import load_config
from llamax.launch import jobfile
from llamax.launch.checks import problems
from llamax.launch.render import PHASES, render
from llamax.parallel.collectives import Solo
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import ConfigError
from llamax.train import train
from llamax.training.metrics import read_jsonl

NAMES = sorted({path.parent.name for path in EXAMPLES.glob("*/*.toml")})  # test_notebooks: the rest
TINY = [
    *("--model.hidden_size=32", "--model.intermediate_size=64", "--model.num_hidden_layers=2"),
    *("--model.num_attention_heads=4", "--model.num_key_value_heads=2"),
    *("--parallel.tensor=1", "--optim.lr=1e-2", "--optim.warmup_steps=0"),
    *("--data.sequence_length=64", "--data.global_batch=4", "--data.micro_batch=2"),
    *("--run.steps=40", "--run.log_every=1", "--run.progress=off", "--run.threads=1"),
]
TUNED = [
    *("--model.hidden_size=64", "--optim.warmup_ratio=0"),
    *("--data.sequence_length=128", "--run.epochs=0"),
    *("--run.backend=cpu", "--run.dtype=float32"),
]


def losses(run: Path) -> list[float]:
    return [record.loss for record in read_jsonl(run / "metrics.jsonl")]


def base(folder: Path, config_path: Path, tokenizer: Path, vocabulary: int) -> list[str]:
    """A tiny model in a Hugging Face folder, and the settings that fit it."""
    settings = [
        *TINY,
        *TUNED,
        f"--model.vocab_size={vocabulary}",
        "--model.bos_token_id=none",
        "--model.eos_token_id=none",
        f"--checkpoint.init_from={folder}",
    ]
    model = load_config(str(config_path), settings).model
    transformers.set_seed(0)
    shape = transformers.LlamaConfig(**model.to_hub("float32"))
    transformers.LlamaForCausalLM(shape).save_pretrained(folder)
    for path in tokenizer.parent.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return settings


def pretrain_own_text(folder: Path) -> list[float]:
    (folder / "text").mkdir()
    for number, text in enumerate(python_sources(6)):
        (folder / "text" / f"{number}.txt").write_text(text[:8000])
    prepare(folder / "data", folder / "text", "--train-tokenizer", 400, "--validation", "0.2")
    config = load_config(
        str(EXAMPLES / "pretrain-own-text/own-text.toml"),
        [*TINY, "--model.vocab_size=400", f"--data.path={folder / 'data'}"]
        + [f"--run.folder={folder / 'run'}"],
    )
    train(config, Rendezvous())
    text = script("pretrain-own-text", "sample").sample(str(folder / "run"), "import ", tokens=5)
    assert isinstance(text, str)
    return losses(folder / "run")


def dolly_finetune(folder: Path) -> list[float]:
    rows = [
        {
            "instruction": f"Which number follows {i % 9}?",
            "context": f"After {i % 9} comes {i % 9 + 1}." if i % 2 else "",
            "response": f"{i % 9 + 1}.",
            "category": "closed_qa" if i % 2 else "open_qa",
        }
        for i in range(60)
    ]
    table = write_rows(folder / "dolly.jsonl", rows)
    tokenizer = llama2_tokenizer(folder)
    prepare(folder / "data", table, "--template", "dolly", "--tokenizer", tokenizer,
            "--validation", "0.2")  # fmt: skip
    recipe = EXAMPLES / "dolly-finetune/dolly.toml"
    settings = base(folder / "base", recipe, tokenizer, 600)
    settings += [f"--data.path={folder / 'data'}", f"--run.folder={folder / 'run'}"]
    train(load_config(str(recipe), settings), Rendezvous())
    ask = script("dolly-finetune", "ask").ask
    asked = "Which number follows 3?", "After 3 comes 4."
    assert isinstance(ask(str(folder / "run"), *asked, tokens=6), str)
    return losses(folder / "run")


def qlora_news(folder: Path) -> list[float]:
    rows = [
        {
            "date": "2022-07-03",
            "category": "economy",
            "press": "YTN",
            "title": f"Title {i}",
            "document": f"Price {i % 7} rose. " * 3,
            "link": "https://example.org/news",
            "summary": f"Price {i % 7} rose.",
        }
        for i in range(60)
    ]
    table = write_rows(folder / "train.jsonl", rows[:40])
    held_out = write_rows(folder / "validation.jsonl", rows[40:50])
    test = write_rows(folder / "test.jsonl", rows[50:])
    tokenizer = llama3_tokenizer(folder / "t") / "tokenizer.json"
    module = script("qlora-news", "summarise")
    prepare(folder / "data", table, "--validation-file", held_out, "--test-file", test,
            "--template", "human-assistant", "--system", module.SYSTEM, "--field",
            "instruction=document", "--field", "answer=summary", "--tokenizer",
            tokenizer)  # fmt: skip
    recipe = EXAMPLES / "qlora-news/news.toml"
    settings = base(folder / "base", recipe, tokenizer, 507)
    settings += [f"--data.path={folder / 'data'}", f"--run.folder={folder / 'run'}"]
    train(load_config(str(recipe), settings), Rendezvous())
    assert 0 <= module.summarise(str(folder / "run"), str(test), limit=2, tokens=6) <= 1
    return losses(folder / "run")


def change_the_attention(folder: Path) -> list[float]:
    module = script("change-the-attention", "sliding_window")
    module.WINDOW = 8
    path = EXAMPLES / "change-the-attention/sliding-window.toml"
    config = load_config(str(path), small_text(folder))
    found: list[float] = module.train(config, Rendezvous())
    return found


def custom_dataset(folder: Path) -> list[float]:
    del folder
    module = script("custom-dataset", "sums")
    settings = [*TINY, "--data.sequence_length=12", "--data.global_batch=32"]
    config = load_config(
        str(EXAMPLES / "custom-dataset/sums.toml"), [*settings, "--data.micro_batch=32"]
    )
    found, right = module.train(config, Rendezvous())
    assert 0 <= right <= 1
    return list(found)


def small_text(folder: Path) -> list[str]:
    """A dataset of text, and the settings of a tiny run on it."""
    (folder / "text").mkdir()
    for number, text in enumerate(python_sources(3)):
        (folder / "text" / f"{number}.txt").write_text(text[:8000])
    prepare(folder / "data", folder / "text", "--train-tokenizer", 400, "--validation", "0")
    paths = [f"--data.path={folder / 'data'}", f"--run.folder={folder / 'run'}"]
    return [*TINY, "--model.vocab_size=400", *paths]


def change_the_loss(folder: Path) -> list[float]:
    path = EXAMPLES / "change-the-loss/z-loss.toml"
    script("change-the-loss", "z_loss").main(["--config", str(path), *small_text(folder)])
    return losses(folder / "run")


def change_the_schedule(folder: Path) -> list[float]:
    path = EXAMPLES / "change-the-schedule/inverse-root.toml"
    settings = [*small_text(folder), "--optim.warmup_steps=5"]
    script("change-the-schedule", "inverse_root").main(["--config", str(path), *settings])
    return losses(folder / "run")


RUNS: dict[str, Callable[[Path], list[float]]] = {
    "pretrain-own-text": pretrain_own_text,
    "dolly-finetune": dolly_finetune,
    "qlora-news": qlora_news,
    "change-the-attention": change_the_attention,
    "change-the-loss": change_the_loss,
    "change-the-schedule": change_the_schedule,
    "custom-dataset": custom_dataset,
}


@pytest.mark.parametrize("name", NAMES)
def test_example_trains_and_its_loss_falls(name: str, tmp_path: Path) -> None:
    found = RUNS[name](tmp_path)
    assert len(found) == 40
    assert sum(found[-8:]) < 0.95 * sum(found[:8]), found


@pytest.mark.parametrize("name", NAMES)
def test_example_has_a_readme_settings_and_a_script(name: str) -> None:
    folder = EXAMPLES / name
    readme = (folder / "README.md").read_text()
    files = [path.name for path in folder.iterdir() if path.suffix in (".py", ".toml")]
    assert {Path(file).suffix for file in files} == {".py", ".toml"}
    for file in files:
        assert file in readme, f"{file} is not mentioned"
    assert "## Run" in readme
    assert "## Expected" in readme
    shell = "".join(re.findall(r"```sh\n(.*?)```", readme, re.DOTALL))
    for command in re.findall(r"^llamax (\w+)", shell, re.MULTILINE):
        assert command in COMMANDS
    for file in re.findall(r"(\S+\.(?:py|toml))\b", shell):
        assert file in files, f"{file} is not in {name}"
    assert f"[{name}]({name})" in (EXAMPLES / "README.md").read_text()


@pytest.mark.parametrize(
    ("launcher", "phase"),
    [("sagemaker", phase) for phase in PHASES["sagemaker"]] + [("docker", "serve")],
)
def test_the_job_of_the_news_is_right_for_every_phase(launcher: str, phase: str) -> None:
    job = jobfile.load(EXAMPLES / "qlora-news/job.toml")
    command = f"--on {launcher}" + ("" if phase == "train" else f" --phase {phase}")
    assert (
        f"llamax launch --job job.toml {command}" in (EXAMPLES / "qlora-news/README.md").read_text()
    )
    for nodes, instance in ((1, job.instance), (2, "g5.48xlarge"), (1, "g5.12xlarge")):
        there = replace(job, nodes=nodes, instance=instance)
        assert problems(there, launcher, phase) == []
        assert render(there, launcher, phase)


def test_a_window_sees_only_recent_tokens_of_its_document() -> None:
    module = script("change-the-attention", "sliding_window")
    documents = torch.tensor([[0, 0, 0, 0, 1, 1]])
    attend = module.sliding_window(2, documents)
    q, k = torch.randn(1, 6, 2, 6), torch.randn(1, 6, 1, 6)
    v = torch.eye(6)[None, :, None, :]  # the output is the attention itself
    seen = attend(q, k, v, 1)[0, :, 0] > 0
    expected = torch.zeros(6, 6, dtype=torch.bool)
    for query, keys in enumerate(([0], [0, 1], [1, 2], [2, 3], [4], [4, 5])):
        expected[query, keys] = True
    assert torch.equal(seen, expected)
    assert torch.equal(attend(q, k, v, 0)[0, 3, 0] > 0, torch.arange(6) < 4), "a full layer"


def test_a_window_is_refused_for_parts_of_sequences() -> None:
    module = script("change-the-attention", "sliding_window")
    path = str(EXAMPLES / "change-the-attention/sliding-window.toml")
    config = load_config(path, ["--parallel.context=2", "--parallel.tensor=1"])
    with pytest.raises(ConfigError, match="the window needs whole sequences"):
        module.train(config, Rendezvous(world_size=2))


def test_sums_are_right_and_only_their_results_are_learnt() -> None:
    module = script("custom-dataset", "sums")
    assert module.Sums.text(123_456) == "123+456=9750"
    assert module.Sums.text(999_999) == "999+999=8991"
    config = load_config(str(EXAMPLES / "custom-dataset/sums.toml"))
    rows = module.Sums(config, Solo("data")).read(np.array([123_456]))
    labels = rows.labels[0].tolist()
    assert [module.SYMBOLS[label] for label in labels if label >= 0] == list("9750")
    assert labels[:7] == [-100] * 7
