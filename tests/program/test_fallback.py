"""Which checkpoint the training program resumes from, and what it reports about it."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from support import tiny_run

from llamax.checkpoint import newest_checkpoint
from llamax.checkpoint.reader import Checkpoint
from llamax.cli.train import main
from llamax.config.schema import CheckpointConfig, Config
from llamax.data.dataset import Dataset
from llamax.data.tokenizer.train import train_sentencepiece
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.logging import logger
from llamax.runtime.process import run_main
from llamax.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Three steps, each with a checkpoint that holds a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "data").mkdir()
    texts = [f"def name_{i}(x): return x + {i}\n" for i in range(200)]
    tokenizer = train_sentencepiece(texts, 300, folder / "tokenizer.model")
    data = tiny_run.make_dataset(folder / "data", tokenizer.read_bytes())
    small = tiny_run.config(data, folder / "run")
    whole = dataclasses.replace(small, model=dataclasses.replace(small.model, vocab_size=300))
    few = dataclasses.replace(whole.run, steps=3, validate_every=1)
    kept = CheckpointConfig(every=1, keep=0, also_hf=True, keep_best=True)
    config = dataclasses.replace(whole, run=few, checkpoint=kept)
    train(config, Rendezvous())
    return config


def argv(config: Config, folder: Path, *more: str) -> list[str]:
    return ["--config", str(tiny_run.write(config, folder / "config.toml")), *more]


def test_every_checkpoint_holds_what_transformers_loads(run: Config) -> None:
    for step in (1, 2, 3):
        hub = Path(run.run.folder) / f"checkpoints/step-{step:08d}/hub"
        model = transformers.LlamaForCausalLM.from_pretrained(hub)
        assert model.config.vocab_size == 300
        tokenizer = transformers.AutoTokenizer.from_pretrained(hub)
        assert tokenizer.decode(tokenizer.encode("def name_3(x)", add_special_tokens=False))


def test_a_run_without_validation_text_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    data = tiny_run.make_dataset(tmp_path / "data")
    small = tiny_run.config(data, tmp_path / "run")
    one = dataclasses.replace(small.run, steps=2)
    train(dataclasses.replace(small, run=one), Rendezvous())
    assert "nothing will be validated" not in caplog.text
    (data / "validation.tokens").unlink()
    train(dataclasses.replace(small, run=dataclasses.replace(one, steps=3)), Rendezvous())
    assert f"nothing will be validated: {data} holds no validation text" in caplog.text


def test_a_tokenizer_that_no_save_could_write_is_refused_at_the_start(
    run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    data = tiny_run.make_dataset(tmp_path / "data", b"no tokenizer")
    options = (f"--data.path={data}", f"--run.folder={tmp_path / 'run'}")
    try:
        assert run_main(main, argv(run, tmp_path, *options)) == 2
    finally:
        logger.handlers.clear()
    assert f"{data / 'tokenizer.model'}: is not a tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_damage_is_refused_and_falling_back_is_a_choice(
    run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = newest_checkpoint(Path(run.run.folder))
    assert last is not None
    damaged = next(last.glob("weights-*"))
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    longer = ("--run.steps=4",)
    try:
        assert run_main(main, argv(run, tmp_path, *longer)) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{damaged} changed after it was saved: the checksum of its bytes " in line
        assert line.endswith(
            "the newest intact checkpoint is " + str(last.parent / "step-00000002")
        )
        fallback = (*longer, "--checkpoint.resume=intact")
        assert run_main(main, argv(run, tmp_path, *fallback)) == 0
        said = capsys.readouterr().err
        assert "skipping step-00000003: " in said
        assert f"resuming from {last.parent / 'step-00000002'}, after step 2" in said
        kept = {path: path.read_bytes() for path in last.parent.glob("step-*/done")}
        for path in kept:
            path.write_bytes(b"")
        assert run_main(main, argv(run, tmp_path, *fallback)) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith(f"llamax: no checkpoint in {last.parent} is intact; restore one")
        for path, text in kept.items():  # nothing was set aside
            path.write_bytes(text)
    finally:
        logger.handlers.clear()
    assert run_main(main, argv(run, tmp_path, *longer)) == 0, "step 3 is whole again"


def test_a_refusal_does_not_wait_for_all_data_to_be_checked(
    run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its launcher would end it, and what it has to say be lost."""
    found: list[bool] = []

    def verify(data: Dataset, share: int, of: int, go_on: Callable[[], bool]) -> None:
        late = time.monotonic() + 300
        while go_on() and time.monotonic() < late:
            time.sleep(0.01)
        found.append(go_on())

    monkeypatch.setattr(Dataset, "verify", verify)
    last = newest_checkpoint(Path(run.run.folder))
    assert last is not None
    path = next(last.glob("weights-*"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        assert run_main(main, argv(run, tmp_path, "--run.steps=4")) == 2
    finally:
        logger.handlers.clear()
        path.write_bytes(whole)
    assert found == [False]


@pytest.mark.parametrize("state", [torch.zeros(8, dtype=torch.uint8), torch.zeros(8)])
def test_a_random_state_of_another_torch(
    run: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    state: torch.Tensor,
) -> None:
    monkeypatch.setattr(Checkpoint, "rng", lambda *ranks: state)
    try:
        assert run_main(main, argv(run, tmp_path, "--run.steps=4")) == 2
    finally:
        logger.handlers.clear()
    line, last = (
        capsys.readouterr().err.strip().splitlines()[-1],
        newest_checkpoint(Path(run.run.folder)),
    )
    assert f"{last} holds a random state that torch {torch.__version__} cannot read" in line


def test_a_fresh_start_is_reported(
    run: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("llamax").propagate = True
    caplog.set_level(logging.INFO, "llamax")
    fresh = dataclasses.replace(run.run, folder=str(tmp_path / "run"), steps=1)
    optim = dataclasses.replace(run.optim, warmup_steps=0)
    train(dataclasses.replace(run, run=fresh, optim=optim), Rendezvous())
    assert f"starting fresh: {tmp_path / 'run'} has no complete checkpoint" in caplog.text
