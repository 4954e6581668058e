"""Saving where a disk is full, a rank is missing, or an earlier process died half way."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import support.checkpoints as worlds
import torch
from support.mounts import lack
from support.saving import disk_full, save_step, saver

from llamax.checkpoint import (
    Checkpoint,
    atomic,
    listing,
    newest_checkpoint,
    save,
)
from llamax.checkpoint import manifest as files
from llamax.runtime.errors import CheckpointError, NoRoom

MODEL = worlds.llama()


def test_a_replacement_that_dies_half_way_is_undone(
    tmp_path: Path, rank: worlds.Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = saver(tmp_path, rank)
    save_step(mine, rank, 1)
    mine.wait()
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_done", disk_full)
        save_step(mine, rank, 1)
        with pytest.raises(CheckpointError, match="no room"):
            mine.wait()
        save_step(mine, rank, 2)
        with pytest.raises(CheckpointError, match=r"no room.*step-00000001 stays"):
            mine.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    Checkpoint(tmp_path / "step-00000001").verify()


@pytest.mark.parametrize("operation", ["rename folders", "rename"])
def test_a_file_system_that_cannot_rename_is_one_line(
    tmp_path: Path, rank: worlds.Rank, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    mine = saver(tmp_path, rank)
    lack(monkeypatch, operation, tmp_path)
    save_step(mine, rank, 1)
    with pytest.raises(CheckpointError, match=r"cannot write .*Function not implemented; step 1"):
        mine.wait()
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_sync_of_folders_is_whole(
    tmp_path: Path, rank: worlds.Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    lack(monkeypatch, "sync folders", tmp_path)
    mine = saver(tmp_path, rank)
    save_step(mine, rank, 1)
    mine.wait()
    Checkpoint(tmp_path / "step-00000001").verify()
    lack(monkeypatch, "sync folders", tmp_path, errno.EIO)
    save_step(mine, rank, 2)
    with pytest.raises(CheckpointError, match=r"cannot write .*Input/output error; step 2 is not"):
        mine.wait()


def test_leftovers_are_swept_at_the_start(tmp_path: Path, rank: worlds.Rank) -> None:
    mine = saver(tmp_path, rank)
    for step in (1, 2):
        save_step(mine, rank, step)
    mine.wait()
    (tmp_path / "step-00000003.tmp").mkdir()
    (tmp_path / "step-00000003.tmp" / "rank-tp00-dp00.json").write_text("[]")
    (tmp_path / "step-00000004").mkdir()
    (tmp_path / "notes").mkdir()
    # killed between the two renames of a replacement: the old one is still whole
    os.rename(tmp_path / "step-00000002", tmp_path / "step-00000002.old")
    saver(tmp_path, rank)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "notes",
        "step-00000001",
        "step-00000002",
    ]
    Checkpoint(tmp_path / "step-00000002").verify()


def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, rank: worlds.Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = saver(tmp_path, rank)
    save_step(mine, rank, 1)
    mine.wait()
    monkeypatch.setattr("llamax.checkpoint.safetensors_io.os.pwrite", disk_full)
    save_step(mine, rank, 2)
    with pytest.raises(
        NoRoom,
        match=r"no room for .*: \d{5} bytes needed, \d+ free; .*step 2 is not saved, .*1 stays",
    ) as caught:
        mine.wait()
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    monkeypatch.undo()
    mine.check()  # said once
    save_step(mine, rank, 3)
    mine.wait()
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000003"


def test_an_error_surfaces_at_the_next_check(
    tmp_path: Path, rank: worlds.Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*args: Any, **options: Any) -> Any:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("llamax.checkpoint.safetensors_io.os.pwrite", denied)
    mine = saver(tmp_path, rank)
    save_step(mine, rank, 1)
    for thread in threading.enumerate():
        if thread.name == "llamax-checkpoint":
            thread.join()
    with pytest.raises(CheckpointError, match=r"cannot write .*Permission denied; step 1 is not"):
        mine.check()


def test_a_programming_error_keeps_its_traceback(
    tmp_path: Path, rank: worlds.Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "write_safetensors", lambda *args: 1 / 0)
    mine = saver(tmp_path, rank)
    save_step(mine, rank, 1)
    with pytest.raises(ZeroDivisionError):
        mine.wait()


def test_the_missing_rank_is_named(tmp_path: Path) -> None:
    ranks = worlds.world(MODEL, 1, 3, True, worlds.wholes(MODEL))
    first, _, third = (saver(tmp_path, rank, timeout_s=0.1) for rank in ranks)
    save_step(third, ranks[2], 1)
    third.wait()
    save_step(first, ranks[0], 1)
    with pytest.raises(CheckpointError, match=r"no files from rank tp00-dp01 within 0 s"):
        first.wait()


def test_the_first_may_be_done_before_another_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a rank has shown its note, its folder may take its name: the rank needs it no more."""
    ranks = worlds.world(MODEL, 1, 2, True, worlds.wholes(MODEL))
    first, second = (saver(tmp_path, rank) for rank in ranks)
    real = os.replace

    def slowly(source: Path, target: Path) -> None:
        real(source, target)
        if Path(target).name == "rank-tp00-dp01.json":
            first.wait()  # all of rank 0's part happens within this call

    monkeypatch.setattr(atomic.os, "replace", slowly)
    save_step(first, ranks[0], 1)
    save_step(second, ranks[1], 1)
    second.wait()
    Checkpoint(tmp_path / "step-00000001").verify()


def test_a_rank_that_cannot_write_reports_to_rank_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = worlds.world(MODEL, 1, 2, True, worlds.wholes(MODEL))
    first, second = (saver(tmp_path, rank) for rank in ranks)
    real = save.write_safetensors
    monkeypatch.setattr(
        save,
        "write_safetensors",
        lambda path, tensors: disk_full() if "dp01" in path.name else real(path, tensors),
    )
    save_step(second, ranks[1], 1)
    with pytest.raises(OSError, match="No space"):
        second.wait()
    save_step(first, ranks[0], 1)
    with pytest.raises(CheckpointError, match=r"rank tp00-dp01 could not save: .*No space left"):
        first.wait()
    assert newest_checkpoint(tmp_path) is None


def test_an_error_is_kept_where_the_whole_file_system_is_gone(
    tmp_path: Path, rank: worlds.Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = saver(tmp_path, rank)
    for module, name in ((save, "write_safetensors"), (listing, "newest_checkpoint")):
        monkeypatch.setattr(module, name, stale)
    save_step(mine, rank, 1)
    with pytest.raises(CheckpointError, match="Stale file handle"):
        mine.wait()


def stale(*args: Any, **options: Any) -> Any:
    with atomic.explain_write_errors(Path("/checkpoints"), 0):
        raise OSError(errno.ESTALE, "Stale file handle")


@pytest.mark.parametrize(
    ("lost", "match"),
    [
        (
            {("self_attn.o_proj", "weight", 0)},
            "was not saved: the runs of .*o_proj.* do not cover its shape",
        ),
        ({("self_attn.qkv_proj", "weight", 576)}, "was not saved: .*k_proj.weight has no weight"),
        ({("mlp.gate_up_proj", "exp_avg", n) for n in (0, 960)}, "gate_proj.weight has no exp_avg"),
        (
            {("mlp.down_proj", kind, n) for kind in worlds.kinds(torch.float32) for n in (0, 480)},
            "no rank owns any of model.layers.1.mlp.down_proj.weight",
        ),
    ],
)
def test_a_piece_too_few_is_no_checkpoint(
    tmp_path: Path, lost: set[tuple[str, str, int]], match: str
) -> None:
    """Ranks that do not own all of the model: refused when saving, not when resuming."""
    ranks = worlds.world(MODEL, 1, 2, True, worlds.wholes(MODEL))
    named = {(f"model.layers.1.{name}.weight", kind, start) for name, kind, start in lost}
    before = len(ranks[1].owned)
    ranks[1].owned = [r for r in ranks[1].owned if (r.name, r.kind, r.start) not in named]
    assert len(ranks[1].owned) == before - len(lost)
    with pytest.raises(CheckpointError, match=match):
        worlds.save(tmp_path, MODEL, ranks)
    assert newest_checkpoint(tmp_path) is None
