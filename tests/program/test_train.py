"""The training program as a user runs it: resume to the bit, other meshes, ranks that die."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.tiny_run import (
    MODEL,
    STEPS,
    config,
    describe,
    forget,
    fork_ranks,
    hashes,
    log_of,
    make_dataset,
    torchrun,
    write,
)

from llamax.checkpoint.reader import Checkpoint
from llamax.cli.train import main
from llamax.config.load import load_config
from llamax.config.schema import CheckpointConfig
from llamax.data.batch_plan import BatchPlan
from llamax.data.dataset import open_dataset
from llamax.data.header import Header
from llamax.data.loader import Loader
from llamax.data.token_file import TokenWriter
from llamax.optim.schedule import lr_at
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import CheckpointError
from llamax.runtime.process import run_main
from llamax.train import train
from llamax.training import inputs
from llamax.training.resolve import resolve


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dataset"))


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


def test_a_finished_run_is_left_alone(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("llamax").propagate = True
    caplog.set_level(logging.INFO, "llamax")
    cfg = config(dataset, tmp_path)
    train(cfg, Rendezvous())
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert "in 4 microsteps, steps 1 to 6" in caplog.text
    assert "BOS" not in caplog.text
    shorter = dataclasses.replace(
        cfg,
        run=dataclasses.replace(cfg.run, steps=3),
        model=dataclasses.replace(cfg.model, bos_token_id=1),
    )
    for again, steps in ((cfg, 6), (shorter, 3)):
        train(again, Rendezvous())
        assert f"in 4 microsteps, nothing left of run.steps={steps}" in caplog.text
        assert (
            "this run is finished; to go on, give --run.steps=N with N above 6; to" in caplog.text
        )
        caplog.clear()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert "repeats samples" not in caplog.text
    again = dataclasses.replace(
        again,
        run=dataclasses.replace(again.run, steps=7),
        data=dataclasses.replace(again.data, global_batch=64, micro_batch=64),
    )
    train(again, Rendezvous())
    assert "this run is finished" not in caplog.text
    says = "BOS token, but the model will be prompted with BOS token 1; set model.bos_token_id=none"
    assert says in caplog.text
    says = f"{dataset} has 15 samples, and data.global_batch=64 is more"
    assert f"every step repeats samples: {says}" in caplog.text


def test_what_changed_since_the_checkpoint_is_reported(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("llamax").propagate = True
    caplog.set_level(logging.INFO, "llamax")
    cfg = config(dataset, tmp_path)
    train(cfg, Rendezvous())
    forget(tmp_path, 3)
    replaced = dataclasses.replace

    def resumed(**sections: Any) -> list[str]:
        """What is reported of a run with these sections, resumed after step 3."""
        changed = replaced(cfg, **sections)
        inputs_ = inputs.open_inputs(changed)
        return inputs_.changed(resolve(changed, 1, len(inputs_.training)))

    assert resumed() == []
    before = lr_at(4, cfg.optim, STEPS)
    for steps in (5, 60):
        after = lr_at(4, cfg.optim, steps)
        assert resumed(run=replaced(cfg.run, steps=steps)) == [
            f"run.steps {STEPS} -> {steps}",
            f"learning rate of step 4 {before:.3e} -> {after:.3e}",
        ]
    found = resumed(run=replaced(cfg.run, epochs=2))  # of 15 samples, in steps of 4
    assert found[:1] == [f"run.steps {STEPS} -> 8"]
    found = resumed(optim=replaced(cfg.optim, schedule="wsd", decay_steps=2))
    assert found[:2] == ['optim.schedule "cosine" -> "wsd"', "optim.decay_steps 0 -> 2"]
    assert found[2] == f"learning rate of step 4 {before:.3e} -> {cfg.optim.lr:.3e}"
    found = resumed(parallel=replaced(cfg.parallel, zero=0))
    assert found == ["parallel.zero 1 -> 0"]
    changed = replaced(cfg, parallel=replaced(cfg.parallel, tensor=2))
    open_inputs = inputs.open_inputs(changed)
    assert open_inputs.changed(resolve(changed, 4, 15)) == [
        "parallel.tensor 1 -> 2",
        "parallel.data 1 -> 2",
    ]
    train(replaced(cfg, run=replaced(cfg.run, steps=5)), Rendezvous())
    after = lr_at(4, cfg.optim, 5)
    assert (
        f"changed since then: run.steps {STEPS} -> 5, learning rate of step 4 "
        f"{before:.3e} -> {after:.3e}"
    ) in caplog.text
    assert log_of(tmp_path)[3]["lr"] == pytest.approx(after)


def test_the_run_folder_holds_the_resolved_configuration(dataset: Path, tmp_path: Path) -> None:
    cfg = config(dataset, tmp_path)
    train(cfg, Rendezvous())
    assert load_config(str(tmp_path / "config.toml")) == cfg


def test_a_run_starts_from_a_hugging_face_folder(dataset: Path, tmp_path: Path) -> None:
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODEL.to_hub("float32")))
    reference.save_pretrained(tmp_path / "hub")
    cfg = config(dataset, tmp_path / "run")
    first = Loader(open_dataset(dataset).train, BatchPlan(cfg.run.seed, 32, 4, 4)).step()[0]
    positions, documents = first.positions, first.documents
    assert documents is not None
    same = documents.unsqueeze(1) == documents.unsqueeze(2)
    logits = reference(
        first.ids, position_ids=positions, attention_mask=same.tril().unsqueeze(1)
    ).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), first.labels.flatten())

    checkpoint = CheckpointConfig(init_from=str(tmp_path / "hub"))
    train(dataclasses.replace(cfg, checkpoint=checkpoint), Rendezvous())

    assert log_of(tmp_path / "run")[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


# --- under torchrun ------------------------------------------------------------------------------


def test_meshes_agree_and_resume_from_each_other(dataset: Path, tmp_path: Path) -> None:
    alone = config(dataset, tmp_path / "alone")
    train(alone, Rendezvous())
    expected = log_of(tmp_path / "alone")
    cfg = config(dataset, tmp_path / "meshes")
    path = write(cfg, tmp_path / "config.toml")
    for stopped, ranks, tensor in ((0, 4, 2), (4, 4, 4), (2, 2, 1)):
        forget(tmp_path / "meshes", stopped) if stopped else None
        job = fork_ranks(ranks, "--config", path, f"--parallel.tensor={tensor}")
        _, stderr = job.communicate(timeout=300)
        assert job.returncode == 0, stderr
        assert f"resuming from {tmp_path}" in stderr or not stopped
        for mine, theirs in zip(log_of(tmp_path / "meshes"), expected, strict=True):
            assert mine.pop("step") == theirs["step"]
            for key, value in mine.items():
                assert value == pytest.approx(theirs[key], rel=1e-5), key


def test_context_ranks_agree_and_resume_from_each_other(dataset: Path, tmp_path: Path) -> None:
    """A run that goes on with context 2, with tensor 2 beside it, and alone again, is the same."""
    train(config(dataset, tmp_path / "alone"), Rendezvous())
    expected, log = log_of(tmp_path / "alone"), ""
    path = write(config(dataset, tmp_path / "meshes"), tmp_path / "config.toml")
    for stopped, tensor, context in ((0, 1, 1), (1, 1, 2), (3, 2, 2), (5, 1, 1)):
        forget(tmp_path / "meshes", stopped) if stopped else None
        way = "ring" if tensor == 2 else "gather"
        degrees = [f"--parallel.tensor={tensor}", f"--parallel.context={context}"]
        degrees.append(f"--parallel.context_by={way}")
        job = fork_ranks(tensor * context, "--config", path, *degrees)
        _, stderr = job.communicate(timeout=300)
        assert job.returncode == 0, stderr
        log += stderr
        for mine, theirs in zip(log_of(tmp_path / "meshes"), expected, strict=True):
            assert mine.keys() == theirs.keys()
            for key, value in mine.items():
                assert value == pytest.approx(theirs[key], rel=1e-5), (mine["step"], key)
    assert "parallel.context 1 -> 2" in log
    assert "parallel.context 2 -> 1" in log
    assert "tensor 2 with sequence parallelism x context 2 x data 1 with ZeRO-1" in log


def test_stages_agree_and_resume_from_each_other(dataset: Path, tmp_path: Path) -> None:
    """A run that goes on with 2 stages, with 4, with 2 beside tensor 2, and alone, is the same."""
    deep = dataclasses.replace(MODEL, num_hidden_layers=4, tie_word_embeddings=True)
    whole = dataclasses.replace(config(dataset, tmp_path / "alone"), model=deep)
    train(whole, Rendezvous())
    expected, log = log_of(tmp_path / "alone"), ""
    run = dataclasses.replace(whole.run, folder=str(tmp_path / "meshes"))
    path = write(dataclasses.replace(whole, run=run), tmp_path / "config.toml")
    cases = (
        (0, 1, 1, "", 1),
        (1, 1, 2, "", 2),
        (2, 1, 4, "", 1),
        (4, 2, 2, "1,3", 1),
        (5, 1, 1, "", 1),
    )
    for stopped, tensor, stages, layers, chunks in cases:
        forget(tmp_path / "meshes", stopped) if stopped else None
        degrees = [f"--parallel.tensor={tensor}", f"--parallel.pipeline={stages}"]
        degrees += [f"--parallel.chunks={chunks}"]
        degrees += [f"--parallel.layers_per_stage={layers}"] if layers else []
        job = fork_ranks(tensor * stages, "--config", path, *degrees)
        _, stderr = job.communicate(timeout=300)
        assert job.returncode == 0, stderr
        log += stderr
        for mine, theirs in zip(log_of(tmp_path / "meshes"), expected, strict=True):
            assert mine.keys() == theirs.keys()
            for key, value in mine.items():
                assert value == pytest.approx(theirs[key], rel=1e-5), (mine["step"], key)
    assert "parallel.pipeline 1 -> 2, parallel.chunks 1 -> 2" in log
    assert 'parallel.pipeline 4 -> 2, parallel.layers_per_stage "" -> "1,3"' in log
    assert "tensor 2 with sequence parallelism x pipeline 2 x data 1" in log
    folders = [Checkpoint(tmp_path / name / "checkpoints/step-00000006") for name in
               ("alone", "meshes")]  # fmt: skip
    assert folders[0].names() == folders[1].names()
    for name in folders[0].names():
        mine, theirs = (folder.read(name, "weight") for folder in folders)
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name


def test_a_rank_that_dies_ends_the_job(dataset: Path, tmp_path: Path) -> None:
    cfg = config(dataset, tmp_path / "run")
    cfg = dataclasses.replace(
        cfg, run=dataclasses.replace(cfg.run, steps=100_000), checkpoint=CheckpointConfig(every=5)
    )
    job = torchrun(2, write(cfg, tmp_path / "config.toml"), "--parallel.tensor=2")
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) > 12):
        assert job.poll() is None, job.stderr and job.stderr.read()
        time.sleep(0.1)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, stderr = job.communicate(timeout=300)
    assert job.returncode != 0
    ours = [line for line in stderr.splitlines() if line.startswith("llamax: rank")]
    assert all("lost the connection to another rank" in line for line in ours)
    assert "llamax/train.py" not in stderr, "torchrun tells its own story, but not with ours"
    newest = sorted((tmp_path / "run/checkpoints").glob("*/done"))
    assert newest


def test_a_checkpoint_of_a_job_that_was_still_ending_is_refused(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([None, tmp_path / "step-00000009"])
    monkeypatch.setattr(inputs, "newest_checkpoint", lambda folder: next(found))
    with pytest.raises(CheckpointError, match="step-00000009 was saved while this job started"):
        train(config(dataset, tmp_path / "run"), Rendezvous())


# --- what a user may get wrong -------------------------------------------------------------------


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of a refused command line."""
    assert run_main(main, argv) == 2
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
        ("--data.path=nowhere",): "nowhere: is not a dataset",
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


def test_a_resume_reports_what_has_changed(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run folder means its newest checkpoint; one that no training made is no place to go on."""
    cfg, toml = config(dataset, tmp_path / "run"), tmp_path / "config.toml"
    argv = ["--config", str(write(cfg, toml)), f"--checkpoint.resume={tmp_path / 'run'}"]
    assert complaint(capsys, *argv) == (
        f"llamax: there is no checkpoint folder {tmp_path / 'run'}; check the path"
    )
    train(cfg, Rendezvous())
    capsys.readouterr()
    assert run_main(main, [*argv, "--run.steps=7", "--run.seed=3", "--optim.beta1=0.8"]) == 0
    said = capsys.readouterr().err
    assert "resuming from" in said
    assert (
        "changed since then: optim.beta1 0.9 -> 0.8, run.steps 6 -> 7, run.seed 0 -> 3\n"
    ) in said, "the learning rate of step 7 is the same"
    assert run_main(main, [*argv, "--run.steps=8", "--run.seed=3", "--optim.beta1=0.8"]) == 0
    assert "changed since then: run.steps 7 -> 8\n" in capsys.readouterr().err
    manifest = tmp_path / "run/checkpoints/step-00000008/manifest.json"
    manifest.write_text(manifest.read_text().replace('"consumed_sequences":32', '"other":1'))
    done = hashlib.sha256(manifest.read_bytes()).hexdigest()
    (manifest.parent / "done").write_text(done)
    assert "does not say how much its training has seen" in complaint(capsys, *argv)


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
