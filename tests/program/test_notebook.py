"""``llamax.train`` and ``llamax.load`` as a notebook uses them: in one process, again and again."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import DECIDED
from support.tiny_run import STEPS, config, make_dataset

import llamax
from llamax.cli.generate import main as generate
from llamax.config.load import dump_config
from llamax.config.schema import Config
from llamax.data.tokenizer.train import train_sentencepiece
from llamax.inference.language_model import LanguageModel
from llamax.runtime import signals
from llamax.runtime.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LlamaxError,
    NotFinite,
    Stopped,
)

VOCABULARY = 320
MODEL = replace(DECIDED, num_hidden_layers=2, vocab_size=VOCABULARY, max_position_embeddings=64)
TEXT = ["def main(argv):", "    return value + 1", "for each in range(10): print(each)"] * 20


OTHERS: set[threading.Thread] = set()  # of tests of other modules; they may end at any moment


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    OTHERS.update(threading.enumerate())
    return make_dataset(tmp_path_factory.mktemp("data"))


def process_state() -> tuple[Any, ...]:
    log = logging.getLogger("llamax")
    handlers = tuple(signal.getsignal(n) for n in (signal.SIGINT, *signals.SIGNALS))
    threads = sorted(thread.name for thread in {*threading.enumerate()} - OTHERS)
    return (
        [*log.handlers],
        log.level,
        log.propagate,
        handlers,
        threads,
        torch.get_num_threads(),
        torch.get_rng_state().tolist(),
        torch.distributed.is_initialized(),
        {**os.environ},
        signals.requested(),
    )


def test_a_run_is_its_folder_its_metrics_and_its_loss(data: Path, tmp_path: Path) -> None:
    before = process_state()
    run = llamax.train(config(data, tmp_path / "run"), {"run.log_every": 2})
    assert process_state() == before, "the process is as it was"
    assert (run.folder, run.step, run.stopped) == (tmp_path / "run", STEPS, False)
    assert [record["step"] for record in run.metrics] == [2, 4, 6]
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert run.metrics == [json.loads(line) for line in lines]
    assert run.loss == run.metrics[-1]["loss"]
    assert run.validation_loss == run.metrics[-1]["validation_loss"]
    assert run.checkpoint == tmp_path / f"run/checkpoints/step-{STEPS:08d}"
    longer = llamax.train(run.config, run={"steps": STEPS + 2})
    assert (longer.step, longer.metrics[: len(run.metrics)]) == (STEPS + 2, run.metrics)
    finished = llamax.train(longer.config)
    assert finished.metrics == longer.metrics
    assert process_state() == before


def test_every_form_of_a_configuration_trains_the_same(data: Path, tmp_path: Path) -> None:
    base = config(data, tmp_path / "0")
    (tmp_path / "run.toml").write_text(dump_config(base))
    model = {key: value for key, value in vars(base.model).items() if value is not None}
    tables: dict[str, Any] = {
        "model": {key: value for key, value in model.items() if key != "rope_scaling"},
        "optim": {"lr": base.optim.lr, "warmup_steps": 2},
        "data": {"path": data, "sequence_length": 32, "global_batch": 4, "micro_batch": 1},
        "checkpoint.every": 1,
        "checkpoint": {"keep": 0},
        "run": {"steps": STEPS, "validate_every": 2, "progress": "off", "threads": 1},
    }
    forms: list[Any] = [base, str(tmp_path / "run.toml"), tmp_path / "run.toml", tables]
    losses = [
        llamax.train(form, run={"folder": str(tmp_path / str(number)), "log_every": 1}).metrics
        for number, form in enumerate(forms)
    ]
    for other in losses[1:]:
        assert [r["loss"] for r in other] == [r["loss"] for r in losses[0]]
        assert [r["grad_norm"] for r in other] == [r["grad_norm"] for r in losses[0]]
    two = llamax.train(base, {"run": {"folder": str(tmp_path / "two"), "log_every": 1}}, ranks=2)
    assert [r["loss"] for r in two.metrics] == pytest.approx([r["loss"] for r in losses[0]])


def test_ctrl_c_saves_and_returns(data: Path, tmp_path: Path) -> None:
    before, presses = process_state(), [3]

    def interrupted(step: int) -> float:
        if step in presses:
            presses.remove(step)
            signal.raise_signal(signal.SIGINT)
        return 1e-3

    cfg = config(data, tmp_path / "run")
    run = llamax.train(cfg, learning_rate=interrupted)
    assert run.stopped
    assert run.checkpoint is not None
    assert 3 <= int(run.checkpoint.name[-8:]) < STEPS
    assert process_state() == before
    assert llamax.train(cfg).step == STEPS
    with pytest.raises(KeyboardInterrupt):  # nothing is saved yet
        llamax.train(
            cfg,
            run={"folder": str(tmp_path / "other")},
            learning_rate=lambda step: signal.raise_signal(signal.SIGINT) or 1e-3,
        )
    assert process_state() == before

    def impatient(step: int) -> float:
        for _ in range(2 * (step == 3)):
            signal.raise_signal(signal.SIGINT)
        return 1e-3

    with pytest.raises(KeyboardInterrupt):
        llamax.train(cfg, run={"folder": str(tmp_path / "third")}, learning_rate=impatient)
    assert process_state() == before


def test_ctrl_c_reaches_started_ranks(data: Path, tmp_path: Path) -> None:
    cfg = config(data, tmp_path / "run")
    log, over = tmp_path / "run/metrics.jsonl", threading.Event()

    def press() -> None:
        while not over.wait(0.02):
            if log.exists() and log.read_text():
                os.kill(os.getpid(), signal.SIGINT)
                return

    presser = threading.Thread(target=press)
    presser.start()
    try:
        run = llamax.train(
            cfg, run={"steps": 100_000, "log_every": 1, "validate_every": 0}, ranks=2
        )
    finally:
        over.set()
        presser.join()
    assert run.stopped
    assert 1 <= run.step < 100_000


def test_mistakes_are_errors_of_one_line(data: Path, tmp_path: Path) -> None:
    before, cfg = process_state(), config(data, tmp_path / "run")
    calls: list[tuple[Any, type[LlamaxError], str]] = [
        (lambda: llamax.train("dem"), ConfigError, "no recipe is named 'dem'; did you mean demo"),
        (
            lambda: llamax.train("demo"),
            ConfigError,
            r"^recipe demo: parallel.tensor=2 does not divide the number of ranks, 1; give "
            r"`ranks=2` or a multiple, or parallel=\{\"tensor\": 1\}$",
        ),
        (lambda: llamax.train(cfg, run={"stesp": 3}), ConfigError, "run.stesp.*did you mean"),
        (lambda: llamax.train(cfg, {"run.steps.x": 3}), ConfigError, "steps is 6 and no section"),
        (
            lambda: llamax.train(cfg, run=3),
            ConfigError,
            "^`run=3` is no section; give run={SETTING",
        ),
        (lambda: llamax.train(7), ConfigError, "a configuration is a recipe's name, a path, a Con"),
        (lambda: llamax.train(cfg, ranks=-1), ConfigError, "`ranks=-1` is below 0"),
        (
            lambda: llamax.train(cfg, ranks=2, learning_rate=lambda step: 1.0),
            ConfigError,
            "`ranks=2` starts programs that know the configuration alone",
        ),
        (lambda: llamax.train(cfg, data={"path": "nowhere"}), DataError, "nowhere"),
        (lambda: llamax.train(cfg, data={"path": "nowhere"}, ranks=2), LlamaxError, "nowhere"),
        (
            lambda: llamax.train(cfg, optim={"most_skipped": 1}, learning_rate=lambda step: 3e38),
            NotFinite,
            "no rank made an update",
        ),
        (lambda: llamax.load(tmp_path / "nothing"), CheckpointError, "nothing"),
        (lambda: llamax.load(data, device="xla"), ConfigError, "`device=xla` is not known"),
        (lambda: llamax.load(data, device="cuda:x"), ConfigError, "`device=cuda:x` is not known"),
        (lambda: llamax.load(data, device="cpu:1"), ConfigError, "`device=cpu:1` does not exist"),
    ]
    for call, kind, words in calls:
        with pytest.raises(kind, match=words) as caught:
            call()
        assert not isinstance(caught.value, Stopped)
        assert process_state() == before
    os.environ |= {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    try:
        with pytest.raises(ConfigError, match="`ranks=2` inside a program that torchrun started"):
            llamax.train(cfg, ranks=2)
    finally:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            del os.environ[name]


def test_a_script_without_a_guard_starts_ranks(data: Path, tmp_path: Path) -> None:
    """And under torchrun the same script, without ``ranks``, is one of its ranks."""
    (tmp_path / "run.toml").write_text(dump_config(config(data, tmp_path / "run")))
    script = tmp_path / "script.py"
    script.write_text("import llamax\nprint(llamax.train('run.toml', ranks=2).loss)\n")
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    script.write_text(
        "import llamax, os\nloss = llamax.train('run.toml', run={'folder': 'b'}).loss\n"
        "os.write(1, f'{loss}\\n'.encode())\n"  # in one piece: two ranks write
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    same = subprocess.run(
        [*launcher, script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert set(same.stdout.split()) == set(done.stdout.split()), "each rank has the result"
    assert "on 2 ranks" in done.stderr


# ---- loading


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("text")
    pieces = train_sentencepiece(TEXT, VOCABULARY, folder / "tokenizer.model")
    for number, text in enumerate(TEXT):
        (folder / f"{number}.txt").write_text(text)
    llamax.prepare(folder, folder / "data", tokenizer=pieces, glob=["*.txt"], validation=0.0)
    cfg = Config(MODEL)
    settings = {"path": str(folder / "data"), "sequence_length": 16, "global_batch": 1}
    return llamax.train(
        cfg,
        data={**settings, "micro_batch": 1},
        run={"folder": str(folder / "run"), "steps": 2, "progress": "off", "threads": 1},
    ).folder


def written(folder: Path, *argv: object) -> str:
    """The answer of the command, which escapes control characters only where it prints."""
    out = folder / f"{len([*folder.iterdir()])}.jsonl"
    assert generate([str(word) for word in [*argv, "--out", out]]) == 0
    text: str = json.loads(out.read_text(encoding="utf-8"))["text"]
    return text


def test_a_loaded_model_says_what_the_command_says(run: Path, tmp_path: Path) -> None:
    hub = llamax.consolidate(run, tmp_path / "hub")
    exported = llamax.export(run, tmp_path / "exported", to="hf")
    for place in (run, run / "checkpoints/step-00000002", hub, str(exported)):
        before = process_state()
        model = llamax.load(place, device=torch.device("cpu"))
        text = model.generate("for", max_new_tokens=12, seed=3)
        assert process_state() == before
        argv = ["--prompt", "for", "--max-new-tokens", 12, "--seed", 3]
        assert text == written(tmp_path, place, *argv)
        drawn = {"temperature": 1.4, "top_p": 0.9, "top_k": 40, "seed": 5, "max_new_tokens": 9}
        options = ["--temperature", 1.4, "--top-p", 0.9, "--top-k", 40, "--seed", 5]
        argv = ["--prompt", "def", *options, "--max-new-tokens", 9]
        assert model.generate("def", **drawn) == written(tmp_path, place, *argv)
        assert "float32 on cpu" in repr(model)


def test_several_prompts_and_a_stream(run: Path) -> None:
    model = llamax.load(run)
    prompts = ["def", "for each", "한국어"]
    texts = model.generate(prompts, max_new_tokens=8, seed=1)
    assert texts == model.generate(prompts, max_new_tokens=8, seed=1, batch=2)
    alone = [model.generate(p, max_new_tokens=8, seed=1 + i) for i, p in enumerate(prompts)]
    assert texts == alone, "prompt i draws with seed + i"
    assert model.generate([], max_new_tokens=8) == []
    pieces = list(model.generate("def", max_new_tokens=8, seed=1, stream=True))
    assert "".join(pieces) == texts[0]
    assert len(pieces) > 1
    assert (
        model.generate("def", max_new_tokens=8, seed=1, stop=texts[0][3])
        == texts[0][:3].split(texts[0][3])[0]
    )
    with pytest.raises(ConfigError, match="`stream=True` takes one prompt"):
        model.generate(prompts, stream=True)
    with pytest.raises(ConfigError, match="prompt 7 is neither a text"):
        model.generate([7])


def test_logits_are_those_of_the_module(run: Path) -> None:
    model = llamax.load(run)
    ids = [1, *model.tokenizer.encode("for each")]
    expected = model.model(torch.tensor([ids])).detach()
    assert torch.equal(model.logits("for each"), expected)
    assert torch.equal(model.logits(ids), expected)
    assert torch.equal(model.logits(torch.tensor([ids, ids]))[1:], expected)
    with pytest.raises(DataError, match="ids hold 400"):
        model.logits([400])
    with pytest.raises(ConfigError, match="there are no ids"):
        model.logits([])


def messages(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def test_conversations_take_the_template_of_the_folder(run: Path, tmp_path: Path) -> None:
    plain = llamax.load(run)
    with pytest.raises(ConfigError, match=r"has no chat template.*give `template`, such as llama3"):
        plain.generate(messages("Who?"))
    explicit = plain.generate(messages("Who?"), template="human-assistant", max_new_tokens=6)
    same = plain.generate("Human: Who?\n\nAssistant:", max_new_tokens=6)
    assert explicit == same
    hub = llamax.consolidate(run, tmp_path / "hub")
    (hub / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    model: LanguageModel = llamax.load(hub)
    talk = messages("Who?", "Me.", "Why?")
    text = "<user>Who?<assistant>Me.<user>Why?<assistant>"
    answer = model.generate(talk, max_new_tokens=6)
    assert answer == model.generate(text, max_new_tokens=6)
    several = model.generate([talk, messages("Who?")], max_new_tokens=6)
    assert several[0] == answer
    assert len(several) == 2
