"""The training program as a user runs it: resume to the bit, other meshes, ranks that die."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llamax import configfile, program
from llamax.config import Checkpoint, Config, Data, Model, Optim, Run
from llamax.data.dataset import open_dataset
from llamax.data.loader import Loader
from llamax.data.tokens import Header, TokenWriter
from llamax.launch.env import Rendezvous
from llamax.train import main, train

MODEL = Model(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=61,
    max_position_embeddings=64,
)
STEPS = 6


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of a noisy counting language; small enough that a run enters its second epoch."""
    folder = tmp_path_factory.mktemp("dataset")
    fingerprint = describe(folder, b"a tokenizer")
    random = np.random.default_rng(0)
    for name, documents in (("train", 9), ("validation", 4)):
        with TokenWriter(
            folder / f"{name}.tokens", Header(fingerprint, MODEL.vocab_size)
        ) as writer:
            for _ in range(documents):
                length = int(random.integers(20, 80))
                start = random.integers(MODEL.vocab_size)
                tokens = (start + np.arange(length) + random.integers(0, 2, length)) % 61
                writer.add(tokens.astype(np.uint16), np.array([length]), length)
    return folder


def describe(folder: Path, tokenizer: bytes) -> str:
    """Make a folder look like a dataset of this tokenizer; its fingerprint."""
    (folder / "tokenizer.model").write_bytes(tokenizer)
    (folder / "dataset.json").write_text(json.dumps({"tokenizer_file": "tokenizer.model"}))
    return hashlib.sha256(tokenizer).hexdigest()


def config(dataset: Path, folder: Path, **run: Any) -> Config:
    return Config(
        model=MODEL,
        optim=Optim(lr=3e-3, warmup_steps=2),
        data=Data(path=str(dataset), sequence_length=32, global_batch=4, micro_batch=1),
        checkpoint=Checkpoint(every=1, keep=0),
        run=Run(
            folder=str(folder), steps=STEPS, validate_every=2, progress="off", threads=1, **run
        ),
    )


def log_of(folder: Path) -> list[dict[str, Any]]:
    """What a run found, without its clock and memory."""
    clock = ("seconds", "step_s", "tokens_per_s", "mfu", "memory_bytes")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: r[key] for key in r if key not in clock} for r in records]


def hashes(folder: Path, step: int) -> dict[str, str]:
    manifest = json.loads((folder / f"checkpoints/step-{step:08d}/manifest.json").read_text())
    return {file["name"]: file["sha256"] for file in manifest["files"]}


def forget(folder: Path, step: int) -> None:
    """Leave the run as if it had been killed after the checkpoint of ``step``."""
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(folder / f"checkpoints/step-{later:08d}")


@pytest.mark.parametrize(
    "run",
    [{}, {"dtype": "bfloat16"}, {"recompute": "full"}, {"recompute": "selective"}],
    ids=lambda run: "-".join(run.values()) or "plain",
)
def test_a_resumed_run_is_the_same_to_the_bit(
    dataset: Path, tmp_path: Path, run: dict[str, Any]
) -> None:
    cfg = config(dataset, tmp_path, **run)
    train(cfg, Rendezvous())
    whole, end = log_of(tmp_path), hashes(tmp_path, STEPS)
    assert [record["step"] for record in whole] == list(range(1, STEPS + 1))
    assert whole[-1]["loss"] < whole[0]["loss"]
    for stopped in (1, 3, 5):
        forget(tmp_path, stopped)
        train(cfg, Rendezvous())
        assert log_of(tmp_path) == whole
        assert hashes(tmp_path, STEPS) == end


def test_a_finished_run_is_left_alone(dataset: Path, tmp_path: Path) -> None:
    cfg = config(dataset, tmp_path)
    train(cfg, Rendezvous())
    before = (tmp_path / "metrics.jsonl").read_bytes()
    train(cfg, Rendezvous())
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_the_run_folder_holds_the_resolved_configuration(dataset: Path, tmp_path: Path) -> None:
    cfg = config(dataset, tmp_path)
    train(cfg, Rendezvous())
    assert configfile.load(str(tmp_path / "config.toml")) == cfg


def test_a_run_starts_from_a_hugging_face_folder(dataset: Path, tmp_path: Path) -> None:
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODEL.to_hub("float32")))
    reference.save_pretrained(tmp_path / "hub")
    cfg = config(dataset, tmp_path / "run")
    first = Loader(open_dataset(dataset).train, cfg.run.seed, 32, 4, 4).step()[0]
    positions, documents = first.positions, first.documents
    assert documents is not None
    same = documents.unsqueeze(1) == documents.unsqueeze(2)
    logits = reference(
        first.ids, position_ids=positions, attention_mask=same.tril().unsqueeze(1)
    ).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), first.labels.flatten())

    checkpoint = Checkpoint(init_from=str(tmp_path / "hub"))
    train(dataclasses.replace(cfg, checkpoint=checkpoint), Rendezvous())

    assert log_of(tmp_path / "run")[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


# --- under torchrun ------------------------------------------------------------------------------


def torchrun(ranks: int, path: Path, *overrides: str) -> subprocess.Popen[str]:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [sys.executable, *command, "-m", "llamax.train", "--config", str(path), *overrides],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def write(cfg: Config, path: Path) -> Path:
    path.write_text(configfile.dump(cfg))
    return path


def test_meshes_agree_and_resume_from_each_other(dataset: Path, tmp_path: Path) -> None:
    alone = config(dataset, tmp_path / "alone")
    train(alone, Rendezvous())
    expected = log_of(tmp_path / "alone")
    cfg = config(dataset, tmp_path / "meshes")
    path = write(cfg, tmp_path / "config.toml")
    for stopped, ranks, tensor in ((0, 4, 2), (4, 4, 4), (2, 2, 1)):
        forget(tmp_path / "meshes", stopped) if stopped else None
        job = torchrun(ranks, path, f"--parallel.tensor={tensor}")
        _, stderr = job.communicate(timeout=120)
        assert job.returncode == 0, stderr
        assert f"resuming from {tmp_path}" in stderr or not stopped
        for mine, theirs in zip(log_of(tmp_path / "meshes"), expected, strict=True):
            assert mine.pop("step") == theirs["step"]
            for key, value in mine.items():
                assert value == pytest.approx(theirs[key], rel=1e-5), key


def test_a_rank_that_dies_ends_the_job(dataset: Path, tmp_path: Path) -> None:
    cfg = config(dataset, tmp_path / "run")
    cfg = dataclasses.replace(
        cfg, run=dataclasses.replace(cfg.run, steps=100_000), checkpoint=Checkpoint(every=5)
    )
    job = torchrun(2, write(cfg, tmp_path / "config.toml"), "--parallel.tensor=2")
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) > 12):
        assert job.poll() is None, job.stderr and job.stderr.read()
        time.sleep(0.1)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, stderr = job.communicate(timeout=60)
    assert job.returncode != 0
    ours = [line for line in stderr.splitlines() if line.startswith("llamax: rank")]
    assert all("lost touch with another rank" in line for line in ours)
    assert "llamax/train.py" not in stderr, "torchrun tells its own story, but not with ours"
    newest = sorted((tmp_path / "run/checkpoints").glob("*/done"))
    assert newest


# --- what a user may get wrong -------------------------------------------------------------------


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of a refused command line."""
    assert program.run(main, argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_mistakes_are_one_line(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write(config(dataset, tmp_path / "run"), tmp_path / "config.toml"))
    hub = tmp_path / "hub"
    other = dataclasses.replace(MODEL, hidden_size=16, head_dim=0)
    shape = transformers.LlamaConfig(**other.to_hub("float32"))
    transformers.LlamaForCausalLM(shape).save_pretrained(hub)
    capsys.readouterr()
    for overrides, expected in {
        ("--data.path=nowhere",): "nowhere: is no dataset",
        ("--model.vocab_size=40",): "its tokenizer has 61 tokens, and model.vocab_size=40",
        ("--data.micro_batch=3",): "data.global_batch=4",
        ("--run.stps=3",): "did you mean run.steps?",
        ("--checkpoint.resume=nowhere",): "nowhere",
        ("--checkpoint.init_from=nowhere",): "nowhere",
        ("--checkpoint.resume=never", f"--checkpoint.init_from={hub}"): "model.hidden_size=32 but",
        ("--run.backend=xla",): "run.backend=xla needs torch-xla",
        ("--parallel.tensor=2",): "world",
    }.items():
        line = complaint(capsys, "--config", path, *overrides)
        assert line.startswith("llamax: ")
        assert expected in line
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused_on_resume(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(dataset, tmp_path / "run")
    train(cfg, Rendezvous())
    other = tmp_path / "other"
    other.mkdir()
    fingerprint = describe(other, b"another")
    with TokenWriter(other / "train.tokens", Header(fingerprint, MODEL.vocab_size)) as writer:
        writer.add(np.zeros(500, np.uint16), np.array([500]), 500)
    path = str(write(cfg, tmp_path / "config.toml"))
    capsys.readouterr()
    line = complaint(capsys, "--config", path, f"--data.path={other}")
    assert f"made with tokenizer {fingerprint[:12]}" in line
