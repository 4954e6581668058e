"""The commit protocol: what is on disk at every moment, and what happens when a save fails."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import support.checkpoints as worlds
import torch

from llamax.checkpoint import (
    Checkpoint,
    Saver,
    hf_beside,
    load_weights,
    newest,
    safetensors_io,
    save,
)
from llamax.checkpoint import manifest as files
from llamax.checkpoint.hf_folder import HubFolder
from llamax.config.model import ModelConfig
from llamax.runtime.errors import CheckpointError, NoRoom

MODEL = worlds.llama()


@pytest.fixture
def rank() -> worlds.Rank:
    return worlds.world(MODEL, 1, 1, True, worlds.wholes(MODEL))[0]


def saver(folder: Path, rank: worlds.Rank, **options: Any) -> Saver:
    return Saver(folder, rank.axes, rank.parameters, rank.shards, **options)


def take(saver: Saver, rank: worlds.Rank, step: int, model: ModelConfig = MODEL) -> None:
    saver.save(step, rank.owned, {"seed": 3}, model.to_hub("float32"), "[run]\nsteps = 9\n")


def test_a_checkpoint_says_what_it_is(tmp_path: Path, rank: worlds.Rank) -> None:
    folder = worlds.save(tmp_path, MODEL, worlds.world(MODEL, 2, 2, True, worlds.wholes(MODEL)), 7)
    found = Checkpoint(folder)
    assert (found.step, found.state) == (7, {"consumed_sequences": 56})
    assert ModelConfig.from_hub(found.model) == MODEL
    assert found.manifest.mesh == {"tensor": 2, "data": 2, "zero1": 1}
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["config.toml", "done", "manifest.json"]
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
    folder = worlds.save(tmp_path, model, ranks, zero1=False)
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
    real = save.write

    def late(*args: Any, **options: Any) -> Any:
        release.wait(30)
        return real(*args, **options)

    monkeypatch.setattr(save, "write", late)
    mine = saver(tmp_path, rank)
    take(mine, rank, 1)
    assert newest(tmp_path) is None
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
    mine = saver(tmp_path, rank, keep=0)
    for step in (1, 2, 3):
        take(mine, rank, step)
        assert sum(t.name == "llamax-checkpoint" for t in threading.enumerate()) <= 1
    mine.wait()
    assert [path.name for path in files.steps(tmp_path)] == [f"step-0000000{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize("background", [True, False])
def test_the_last_ones_stay(tmp_path: Path, rank: worlds.Rank, background: bool) -> None:
    mine = saver(tmp_path / "checkpoints", rank, keep=2, background=background)
    for step in (9, 10, 100):
        take(mine, rank, step)
    mine.wait()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000010",
        "step-00000100",
    ]
    assert newest(tmp_path) == tmp_path / "checkpoints" / "step-00000100"


def test_after_going_back_the_newest_is_the_one_saved_last(
    tmp_path: Path, rank: worlds.Rank
) -> None:
    """What the run went back behind is kept, but nothing resumes from it unless it is told to."""
    mine = saver(tmp_path, rank, keep=3, keep_every=2, keep_best=True)
    for step, score in ((4, 3.0), (6, 1.0), (8, 2.0)):
        mine.save(step, rank.owned, {}, MODEL.to_hub("float32"), "", score=score)
    mine.wait()
    for _ in range(2):
        again = saver(tmp_path, rank, keep=1, keep_best=True)
        take(again, rank, 5)
        again.wait()
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "step-00000004",
            "step-00000005",
            "step-00000006.past",
            "step-00000008.past",
        ], "4 is the best of those that count"
        shutil.copytree(tmp_path / "step-00000008.past", tmp_path / "step-00000008")
    assert Checkpoint(tmp_path / "step-00000008.past").step == 8


def test_a_checkpoint_that_lies_elsewhere_stays_there(tmp_path: Path, rank: worlds.Rank) -> None:
    """Of one that was moved to another disk and linked, retention removes the link alone."""
    mine = saver(tmp_path / "run", rank, keep=1)
    for step in (1, 2, 3):
        take(mine, rank, step)
        mine.wait()
        shutil.move(newest(tmp_path / "run") or "", tmp_path / f"moved{step}")
        (tmp_path / "run" / f"step-{step:08d}").symlink_to(tmp_path / f"moved{step}")
    assert steps_in(tmp_path / "run") == [3]
    take(mine, rank, 3)
    mine.wait()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000003"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "step-00000004").symlink_to(tmp_path / "empty")
    take(saver(tmp_path / "run", rank), rank, 4)
    for step in (1, 2, 3):
        Checkpoint(tmp_path / f"moved{step}").verify()


def test_what_cannot_be_deleted_does_not_fail_a_save(
    tmp_path: Path, rank: worlds.Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system keeps the files that others still read, and so their folder."""

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

    mine = saver(tmp_path, rank, keep=1)
    take(mine, rank, 1)
    mine.wait()
    monkeypatch.setattr(files.shutil, "rmtree", busy)
    take(mine, rank, 2)
    mine.wait()
    assert steps_in(tmp_path) == [2]
    monkeypatch.undo()
    saver(tmp_path, rank)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def steps_in(folder: Path) -> list[int]:
    return [files.step_of(path) for path in files.steps(folder)]


def test_some_stay_for_good(tmp_path: Path, rank: worlds.Rank) -> None:
    mine = saver(tmp_path, rank, keep=1, keep_every=4)
    for step in range(1, 11):
        take(mine, rank, step)
    mine.wait()
    assert steps_in(tmp_path) == [4, 8, 10]


def test_the_best_stays_also_after_a_restart(tmp_path: Path, rank: worlds.Rank) -> None:
    def scored(mine: Saver, step: int, score: float | None) -> None:
        mine.save(step, rank.owned, {}, MODEL.to_hub("float32"), "", score=score)
        mine.wait()

    mine = saver(tmp_path, rank, keep=1, keep_best=True)
    for step, score in ((1, 3.0), (2, 2.0), (3, 2.5), (4, None), (5, float("nan"))):
        scored(mine, step, score)
    assert steps_in(tmp_path) == [2, 5]
    again = saver(tmp_path, rank, keep=1, keep_best=True)
    scored(again, 6, 2.25)
    assert steps_in(tmp_path) == [2, 6]
    scored(again, 7, 1.5)
    assert steps_in(tmp_path) == [7]
    scored(again, 7, 4.0)  # taken back and done again: the old score is no more
    scored(again, 8, 3.5)
    assert steps_in(tmp_path) == [8]
    without = saver(tmp_path, rank, keep=1)
    scored(without, 9, 9.0)
    assert steps_in(tmp_path) == [9]


def test_a_hugging_face_folder_in_every_checkpoint(tmp_path: Path) -> None:
    ranks = worlds.world(MODEL, 2, 2, True, worlds.wholes(MODEL))
    folder = worlds.save(tmp_path, MODEL, ranks, also_hf=True)
    assert not (folder / "hub.part").exists()
    assert len([*(folder / "hub").glob("model-*.safetensors")]) >= 4, "a file a rank"
    assert not list((folder / "hub").glob("rank-*"))
    found = HubFolder(folder / "hub")
    for name in Checkpoint(folder).names():
        assert torch.equal(found.read(name), worlds.wholes(MODEL)[name, "weight"])
    (folder / "hub.part").mkdir()
    saver(tmp_path, ranks[0])
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["hub"]


def test_a_hugging_face_folder_that_finds_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = worlds.world(MODEL, 1, 2, True, worlds.wholes(MODEL))
    first, second = (saver(tmp_path, rank, also_hf=True) for rank in ranks)
    monkeypatch.setattr(hf_beside.hf_writer, "fill", no_quota)
    for mine, rank in ((second, ranks[1]), (first, ranks[0])):
        take(mine, rank, 1)
    for mine in (second, first):
        with pytest.raises(NoRoom, match=r"step 1 is saved, but without a Hugging Face folder"):
            mine.wait()
    monkeypatch.undo()
    Checkpoint(tmp_path / "step-00000001").verify()
    assert not (tmp_path / "step-00000001" / "hub").exists()


def test_rank_0_tells_whose_share_of_the_folder_is_missing(tmp_path: Path) -> None:
    rank = worlds.world(MODEL, 1, 1, True, worlds.wholes(MODEL))[0]
    folder = worlds.save(tmp_path, MODEL, [rank])
    with pytest.raises(CheckpointError, match=r"hub.part: no files from rank 1, 2"):
        hf_beside.leave(folder, tmp_path / "gone", 0, 3, 0.2)
    (folder / "hub.part" / "rank-00001.json").write_text('{"why": "full", "no_room": true}')
    (folder / "hub.part" / "rank-00002.json").write_text("null")
    with pytest.raises(NoRoom, match=r"rank 1 could not write .*hub.part: full"):
        hf_beside.leave(folder, tmp_path / "gone", 0, 3, 0.2)
    hf_beside.leave(folder, folder, 1, 3, 0.1)  # never complete: rank 0 says why


def test_nobody_waits_for_a_checkpoint_that_was_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 has written its files; rank 0 finds no room: training may go on at once."""
    monkeypatch.setattr(hf_beside, "RENAMED_S", 0.1)
    ranks = worlds.world(MODEL, 1, 2, True, worlds.wholes(MODEL))
    first, second = (saver(tmp_path, rank, also_hf=True, timeout_s=30) for rank in ranks)
    monkeypatch.setattr(files, "finish", full)
    take(second, ranks[1], 1)
    take(first, ranks[0], 1)
    began = time.monotonic()
    with pytest.raises(NoRoom):
        first.wait()
    second.wait()
    assert time.monotonic() - began < 10


def no_quota(source: Checkpoint, part: Path, one: Any, *args: Any) -> int:
    with safetensors_io.writing(part / one.file, one.size_bytes):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    return 0


def test_done_is_written_last_and_removed_first(
    tmp_path: Path, rank: worlds.Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    finish, rmtree = files.finish, files.shutil.rmtree

    def check_before(folder: Path) -> None:
        seen.append("done")
        assert folder.name == "step-00000001"
        assert {path.name for path in folder.iterdir()} == {
            "config.toml",
            "manifest.json",
            "weights-tp00-dp00.safetensors",
            "optimizer-tp00-dp00.safetensors",
        }
        finish(folder)

    def check_gone(folder: Path, *args: Any, **options: Any) -> None:
        seen.append("deleted")
        assert not (folder / "done").exists()
        rmtree(folder, *args, **options)

    monkeypatch.setattr(files, "finish", check_before)
    mine = saver(tmp_path, rank)
    take(mine, rank, 1)
    mine.wait()
    monkeypatch.setattr(files.shutil, "rmtree", check_gone)
    files.delete(tmp_path / "step-00000001")
    assert seen == ["done", "deleted"]


def test_a_step_saved_again_replaces_the_old(tmp_path: Path, rank: worlds.Rank) -> None:
    mine = saver(tmp_path, rank)
    take(mine, rank, 1)
    mine.wait()
    for share in rank.parameters.values():
        share.fill_(5)
    take(mine, rank, 1)
    mine.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert (Checkpoint(tmp_path / "step-00000001").read("model.norm.weight") == 5).all()


def test_a_replacement_that_dies_half_way_is_undone(
    tmp_path: Path, rank: worlds.Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = saver(tmp_path, rank)
    take(mine, rank, 1)
    mine.wait()
    with monkeypatch.context() as patch:
        patch.setattr(files, "finish", full)
        take(mine, rank, 1)
        with pytest.raises(CheckpointError, match="no room"):
            mine.wait()
        take(mine, rank, 2)
        with pytest.raises(CheckpointError, match=r"no room.*step-00000001 stays"):
            mine.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    Checkpoint(tmp_path / "step-00000001").verify()


def test_leftovers_are_swept_at_the_start(tmp_path: Path, rank: worlds.Rank) -> None:
    mine = saver(tmp_path, rank)
    for step in (1, 2):
        take(mine, rank, step)
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


def full(*args: Any, **options: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, rank: worlds.Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = saver(tmp_path, rank)
    take(mine, rank, 1)
    mine.wait()
    monkeypatch.setattr("llamax.checkpoint.safetensors_io.os.pwrite", full)
    take(mine, rank, 2)
    with pytest.raises(
        NoRoom,
        match=r"no room for .*: \d{5} bytes needed, \d+ free; .*step 2 is not saved, .*1 stays",
    ) as caught:
        mine.wait()
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    monkeypatch.undo()
    mine.check()  # said once
    take(mine, rank, 3)
    mine.wait()
    assert newest(tmp_path) == tmp_path / "step-00000003"


def test_an_error_surfaces_at_the_next_check(
    tmp_path: Path, rank: worlds.Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*args: Any, **options: Any) -> Any:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("llamax.checkpoint.safetensors_io.os.pwrite", denied)
    mine = saver(tmp_path, rank)
    take(mine, rank, 1)
    for thread in threading.enumerate():
        if thread.name == "llamax-checkpoint":
            thread.join()
    with pytest.raises(CheckpointError, match=r"cannot write .*Permission denied; step 1 is not"):
        mine.check()


def test_a_defect_is_not_dressed_up(
    tmp_path: Path, rank: worlds.Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "write", lambda *args: 1 / 0)
    mine = saver(tmp_path, rank)
    take(mine, rank, 1)
    with pytest.raises(ZeroDivisionError):
        mine.wait()


def test_the_missing_rank_is_named(tmp_path: Path) -> None:
    ranks = worlds.world(MODEL, 1, 3, True, worlds.wholes(MODEL))
    first, _, third = (saver(tmp_path, rank, timeout_s=0.1) for rank in ranks)
    take(third, ranks[2], 1)
    take(first, ranks[0], 1)
    with pytest.raises(CheckpointError, match=r"no files from rank tp00-dp01 within 0 s"):
        first.wait()
    third.wait()


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

    monkeypatch.setattr(safetensors_io.os, "replace", slowly)
    take(first, ranks[0], 1)
    take(second, ranks[1], 1)
    second.wait()
    Checkpoint(tmp_path / "step-00000001").verify()


def test_a_rank_that_cannot_write_tells_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = worlds.world(MODEL, 1, 2, True, worlds.wholes(MODEL))
    first, second = (saver(tmp_path, rank) for rank in ranks)
    real = save.write
    monkeypatch.setattr(
        save, "write", lambda path, tensors: full() if "dp01" in path.name else real(path, tensors)
    )
    take(second, ranks[1], 1)
    with pytest.raises(OSError, match="No space"):
        second.wait()
    take(first, ranks[0], 1)
    with pytest.raises(CheckpointError, match=r"rank tp00-dp01 could not save: .*No space left"):
        first.wait()
    assert newest(tmp_path) is None


def test_an_error_is_kept_where_the_whole_file_system_is_gone(
    tmp_path: Path, rank: worlds.Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = saver(tmp_path, rank)
    for module in (save, files):
        monkeypatch.setattr(module, "write" if module == save else "newest", stale)
    take(mine, rank, 1)
    with pytest.raises(CheckpointError, match="Stale file handle"):
        mine.wait()


def stale(*args: Any, **options: Any) -> Any:
    with safetensors_io.writing(Path("/checkpoints"), 0):
        raise OSError(errno.ESTALE, "Stale file handle")


@pytest.mark.parametrize(
    ("lost", "match"),
    [
        (
            {("self_attn.o_proj", "weight", 0)},
            "was not saved: the pieces of .*o_proj.* do not make",
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
    assert newest(tmp_path) is None


@pytest.mark.parametrize("zero1", [True, False])
def test_frozen_weights_are_kept_without_state(tmp_path: Path, zero1: bool) -> None:
    values, frozen = worlds.wholes(MODEL), "model.embed_tokens.weight"
    ranks = worlds.world(MODEL, 2, 2, zero1, values)
    for rank in ranks:
        weight = rank.parameters[frozen]
        rank.parameters[frozen] = torch.nn.Parameter(weight, requires_grad=False)
        rank.owned = [run for run in rank.owned if run.name != frozen]
    found = Checkpoint(worlds.save(tmp_path, MODEL, ranks, zero1=zero1))
    assert found.kinds(frozen) == ("weight",)
    assert torch.equal(found.read(frozen), values[frozen, "weight"])
    assert set(found.kinds("lm_head.weight")) == {"weight", "exp_avg", "exp_avg_sq"}
    empty = worlds.world(MODEL, 1, 1, True, None)[0]
    load_weights(found, empty.parameters, empty.shards)
    assert torch.equal(empty.parameters[frozen], values[frozen, "weight"])
