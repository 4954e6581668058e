"""Saving: what a checkpoint holds, snapshots, the order of writing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import support.checkpoints as worlds
import torch
from support.saving import save_step, saver

from llamax.checkpoint import (
    Checkpoint,
    load_weights,
    newest_checkpoint,
    retention,
    save,
)
from llamax.checkpoint import manifest as files
from llamax.config.model import ModelConfig
from llamax.config.step_folders import list_checkpoints

MODEL = worlds.llama()


def test_a_checkpoint_describes_itself(tmp_path: Path, rank: worlds.Rank) -> None:
    folder = worlds.save(tmp_path, MODEL, worlds.world(MODEL, 2, 2, True, worlds.wholes(MODEL)), 7)
    found = Checkpoint(folder)
    assert (found.step, found.state) == (7, {"consumed_sequences": 56})
    assert ModelConfig.from_hub(found.model) == MODEL
    assert found.manifest.mesh == {"tensor": 2, "data": 2, "zero": 1}
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["config.toml", "done", "index.bin", "manifest.json"]
        + [f"{role}-tp0{t}-dp0{d}.safetensors" for role in ("weights", "optimizer")
           for t in (0, 1) for d in (0, 1)]
    )  # fmt: skip
    assert [found.rng(t, d) for t, d in ((2, 0), (0, 2))] == [None, None]
    for index, (d, t) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        state = found.rng(t, d)
        assert state is not None
        assert state.tolist() == [index] * 8


def test_no_element_is_written_twice(tmp_path: Path) -> None:
    model = worlds.llama(kv=1)
    ranks = worlds.world(model, 4, 2, False, worlds.wholes(model))
    folder = worlds.save(tmp_path, model, ranks, zero=0)
    elements = sum(tensor.numel() for tensor in worlds.wholes(model).values())
    written = sum(run[4] for t in Checkpoint(folder).manifest.tensors.values()
                  for kept in t.kinds.values() for run in kept.runs)  # fmt: skip
    assert written == elements
    sizes = [path.stat().st_size for path in sorted(folder.glob("optimizer-*"))]
    assert max(sizes) < 0.3 * sum(sizes), "every data rank takes a share"


def test_the_snapshot_is_of_the_moment(
    tmp_path: Path, rank: worlds.Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training changes weights while the files are written: none of that is in them."""
    release = threading.Event()
    real = save.write_safetensors

    def late(*args: Any, **options: Any) -> Any:
        release.wait(300)
        return real(*args, **options)

    monkeypatch.setattr(save, "write_safetensors", late)
    mine = saver(tmp_path, rank)
    save_step(mine, rank, 1)
    assert newest_checkpoint(tmp_path) is None
    for share in rank.parameters.values():
        share.zero_()
    release.set()
    mine.wait()
    values = worlds.wholes(MODEL)
    for name in Checkpoint(tmp_path / "step-00000001").names():
        assert torch.equal(
            Checkpoint(tmp_path / "step-00000001").read(name), values[name, "weight"]
        )


def test_at_most_one_save_is_in_flight(tmp_path: Path, rank: worlds.Rank) -> None:
    mine, before = saver(tmp_path, rank, keep=0), {*threading.enumerate()}
    for step in (1, 2, 3):
        save_step(mine, rank, step)
        new = {*threading.enumerate()} - before
        assert sum(thread.name == "llamax-checkpoint" for thread in new) <= 1
    mine.wait()
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        f"step-0000000{n}" for n in (1, 2, 3)
    ]


def test_done_is_written_last_and_removed_first(
    tmp_path: Path, rank: worlds.Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    finish, rmtree = files.write_done, retention.shutil.rmtree

    def check_before(folder: Path) -> None:
        seen.append("done")
        assert folder.name == "step-00000001"
        assert {path.name for path in folder.iterdir()} == {
            "config.toml",
            "index.bin",
            "manifest.json",
            "weights-tp00-dp00.safetensors",
            "optimizer-tp00-dp00.safetensors",
        }
        finish(folder)

    def check_gone(folder: Path, *args: Any, **options: Any) -> None:
        seen.append("deleted")
        assert not (folder / "done").exists()
        rmtree(folder, *args, **options)

    monkeypatch.setattr(files, "write_done", check_before)
    mine = saver(tmp_path, rank)
    save_step(mine, rank, 1)
    mine.wait()
    monkeypatch.setattr(retention.shutil, "rmtree", check_gone)
    retention.delete_checkpoint(tmp_path / "step-00000001")
    assert seen == ["done", "deleted"]


def test_a_step_saved_again_replaces_the_old(tmp_path: Path, rank: worlds.Rank) -> None:
    mine = saver(tmp_path, rank)
    save_step(mine, rank, 1)
    mine.wait()
    for share in rank.parameters.values():
        share.fill_(5)
    save_step(mine, rank, 1)
    mine.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert (Checkpoint(tmp_path / "step-00000001").read("model.norm.weight") == 5).all()


@pytest.mark.parametrize("zero", [1, 0])
def test_frozen_weights_are_kept_without_state(tmp_path: Path, zero: int) -> None:
    values, frozen = worlds.wholes(MODEL), "model.embed_tokens.weight"
    ranks = worlds.world(MODEL, 2, 2, zero, values)
    for rank in ranks:
        weight = rank.parameters[frozen]
        rank.parameters[frozen] = torch.nn.Parameter(weight, requires_grad=False)
        rank.owned = [run for run in rank.owned if run.name != frozen]
    found = Checkpoint(worlds.save(tmp_path, MODEL, ranks, zero=zero))
    assert found.kinds(frozen) == ("weight",)
    assert torch.equal(found.read(frozen), values[frozen, "weight"])
    assert set(found.kinds("lm_head.weight")) == {"weight", "exp_avg", "exp_avg_sq"}
    empty = worlds.world(MODEL, 1, 1, True, None)[0]
    load_weights(found, empty.sharded)
    assert torch.equal(empty.parameters[frozen], values[frozen, "weight"])


@pytest.mark.parametrize("zero", [1, 0])
def test_the_memory_of_the_first_save_can_be_there_before(tmp_path: Path, zero: int) -> None:
    rank = worlds.world(MODEL, 1, 1, zero, worlds.wholes(MODEL))[0]
    mine = saver(tmp_path, rank)
    mine.prepare(rank.owned)
    mine.wait()
    prepared = [copy.data_ptr() for copy in mine._host._copies]
    save_step(mine, rank, 1)
    assert [copy.data_ptr() for copy in mine._host._copies] == prepared != []
    mine.wait()
    Checkpoint(tmp_path / "step-00000001").verify()


def test_the_next_save_of_the_same_tensors_takes_the_same_memory() -> None:
    host = save.HostCopies()
    tensors = [torch.arange(6.0), torch.ones(2, 3, dtype=torch.bfloat16)]
    first = [*host.take(tensors)]
    tensors[0].zero_()
    assert first[0].tolist() == [0, 1, 2, 3, 4, 5]
    again = host.take(tensors)
    assert [a.data_ptr() for a in again] == [a.data_ptr() for a in first]
    assert again[0].tolist() == [0] * 6
    assert again[1].dtype == torch.bfloat16
    host.touch()
    assert again[1].tolist() == [[0, 0, 0]] * 2
    others = host.take([torch.arange(6)])
    assert [(a.dtype, a.tolist()) for a in others] == [(torch.int64, [0, 1, 2, 3, 4, 5])]
