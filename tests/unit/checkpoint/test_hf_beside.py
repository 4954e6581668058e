"""The Hugging Face folder that is written with each checkpoint."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import support.checkpoints as worlds
import torch
from support.saving import disk_full, save_step, saver

from llamax.checkpoint import (
    Checkpoint,
    atomic,
    hf_beside,
)
from llamax.checkpoint import manifest as files
from llamax.checkpoint.hf_folder import HfFolder
from llamax.runtime.errors import CheckpointError, LinkError, NoRoom

MODEL = worlds.llama()


def test_a_hugging_face_folder_in_every_checkpoint(tmp_path: Path) -> None:
    ranks = worlds.world(MODEL, 2, 2, True, worlds.wholes(MODEL))
    folder = worlds.save(tmp_path, MODEL, ranks, also_hf=True)
    assert not (folder / "hub.part").exists()
    assert len([*(folder / "hub").glob("model-*.safetensors")]) >= 4, "a file a rank"
    assert not list((folder / "hub").glob("rank-*"))
    found = HfFolder(folder / "hub")
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
    monkeypatch.setattr(hf_beside.hf_writer, "write_tensor", no_quota)
    for mine, rank in ((second, ranks[1]), (first, ranks[0])):
        save_step(mine, rank, 1)
    for mine in (second, first):
        with pytest.raises(NoRoom, match=r"step 1 is saved, but without a Hugging Face folder"):
            mine.wait()
    monkeypatch.undo()
    Checkpoint(tmp_path / "step-00000001").verify()
    assert not (tmp_path / "step-00000001" / "hub").exists()


def test_rank_0_names_the_rank_that_wrote_nothing(tmp_path: Path) -> None:
    rank = worlds.world(MODEL, 1, 1, True, worlds.wholes(MODEL))[0]
    folder = worlds.save(tmp_path, MODEL, [rank])
    with pytest.raises(CheckpointError, match=r"hub.part: no files from rank 1, 2"):
        hf_beside.write_hf_folder_beside(folder, tmp_path / "gone", 0, 3, 0.2)
    (folder / "hub.part" / "rank-00001.json").write_text('{"why": "full", "no_room": true}')
    (folder / "hub.part" / "rank-00002.json").write_text("null")
    with pytest.raises(NoRoom, match=r"rank 1 could not write .*hub.part: full"):
        hf_beside.write_hf_folder_beside(folder, tmp_path / "gone", 0, 3, 0.2)
    hf_beside.write_hf_folder_beside(folder, folder, 1, 3, 0.1)  # never complete: rank 0 says why


@pytest.mark.timeout(300)  # savers wait for each other for up to 600 s
def test_nobody_waits_for_a_checkpoint_that_was_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 has written its files; rank 0 finds no room: training may go on at once."""
    monkeypatch.setattr(hf_beside, "DONE_WAIT_S", 0.1)
    ranks = worlds.world(MODEL, 1, 2, True, worlds.wholes(MODEL))
    first, second = (saver(tmp_path, rank, also_hf=True, timeout_s=600) for rank in ranks)
    monkeypatch.setattr(files, "write_done", disk_full)
    save_step(second, ranks[1], 1)
    save_step(first, ranks[0], 1)
    with pytest.raises(NoRoom):
        first.wait()
    second.wait()


def no_quota(source: Checkpoint, part: Path, one: Any, *args: Any) -> int:
    with atomic.explain_write_errors(part / one.file, one.size_bytes):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    return 0


@pytest.mark.timeout(300)  # rank 0 would wait for 600 s
@pytest.mark.parametrize("note", ["a note", "no room for a note"])
@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(errno.EIO, "Input/output error"), r"cannot write .*hub.part: Input/output error"),
        (MemoryError("4 GB"), r"MemoryError\('4 GB'\)"),
        (CheckpointError("changed"), "changed"),
    ],
    ids=["disk", "memory", "damage"],
)
def test_a_failure_of_any_kind_reaches_rank_0_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, why: str, note: str
) -> None:
    rank = worlds.world(MODEL, 1, 1, True, worlds.wholes(MODEL))[0]
    folder = worlds.save(tmp_path, MODEL, [rank])

    def fail(*args: Any) -> None:
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(hf_beside.hf_writer, "allocate_files", fail)
        if note != "a note":
            broken.setattr(hf_beside, "write_note", disk_full)
            why = "see its log"
        with pytest.raises((CheckpointError, MemoryError)):
            hf_beside.write_hf_folder_beside(folder, tmp_path / "gone", 2, 3, 600)
    with pytest.raises(CheckpointError, match=rf"rank 2 could not write .*hub.part: {why}"):
        hf_beside.write_hf_folder_beside(folder, tmp_path / "gone", 0, 3, 600)


def test_a_hugging_face_folder_is_written_through_no_link(tmp_path: Path) -> None:
    rank = worlds.world(MODEL, 1, 1, True, worlds.wholes(MODEL))[0]
    folder, target = worlds.save(tmp_path, MODEL, [rank]), tmp_path / "target"
    target.mkdir()
    (folder / "hub.part").symlink_to(target)
    with pytest.raises(LinkError, match=r"hub.part is a link to .*target; remove it"):
        hf_beside.write_hf_folder_beside(folder, tmp_path / "gone", 0, 1, 600)
    assert not list(target.iterdir())
