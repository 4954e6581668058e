"""Which checkpoints are kept and which are deleted."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import support.checkpoints as worlds
from support.saving import save_step, saver

from llamax.checkpoint import (
    Checkpoint,
    Saver,
    find_checkpoint,
    newest_checkpoint,
    retention,
)
from llamax.config.step_folders import DONE, list_checkpoints, step_of
from llamax.runtime.errors import LinkError

MODEL = worlds.llama()


@pytest.mark.parametrize("background", [True, False])
def test_the_last_ones_stay(tmp_path: Path, rank: worlds.Rank, background: bool) -> None:
    mine = saver(tmp_path / "checkpoints", rank, keep=2, background=background)
    for step in (9, 10, 100):
        save_step(mine, rank, step)
    mine.wait()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000010",
        "step-00000100",
    ]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000100"


def test_after_going_back_the_newest_is_the_one_saved_last(
    tmp_path: Path, rank: worlds.Rank
) -> None:
    """Checkpoints after the one a run went back to are kept, and resumed only by their folder."""
    mine = saver(tmp_path, rank, keep=3, keep_every=2, keep_best=True)
    for step, score in ((4, 3.0), (6, 1.0), (8, 2.0)):
        mine.save(step, rank.owned, {}, MODEL.to_hub("float32"), "", score=score)
    mine.wait()
    for past in ([], ["step-00000008.past-2"]):
        again = saver(tmp_path, rank, keep=1, keep_best=True)
        save_step(again, rank, 5)
        again.wait()
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "step-00000004",
            "step-00000005",
            "step-00000006.past",
            "step-00000008.past",
            *past,
        ], "4 is the best of those that count"
        shutil.copytree(tmp_path / "step-00000008.past", tmp_path / "step-00000008")
    for name in ("step-00000008.past", "step-00000008.past-2"):
        assert Checkpoint(tmp_path / name).step == 8
        assert find_checkpoint(tmp_path / name) == tmp_path / name
    assert steps_in(tmp_path) == [4, 5, 8]
    (tmp_path / "step-00000008.past-2" / "precious").write_text("x")
    saver(tmp_path, rank)
    assert (tmp_path / "step-00000008.past-2" / "precious").exists()


def test_the_score_of_a_step_that_is_saved_again_is_forgotten(
    tmp_path: Path, rank: worlds.Rank
) -> None:
    """A run that went back, and no longer validates in that step."""
    mine = saver(tmp_path, rank, keep=2, keep_best=True)
    for step, score in ((2, 2.0), (4, 1.0)):
        mine.save(step, rank.owned, {}, MODEL.to_hub("float32"), "", score=score)
    mine.wait()
    again = saver(tmp_path, rank, keep=2, keep_best=True)
    for step in (4, 6, 8):
        save_step(again, rank, step)
    again.wait()
    assert steps_in(tmp_path) == [2, 6, 8]


def test_a_checkpoint_that_lies_elsewhere_stays_there(tmp_path: Path, rank: worlds.Rank) -> None:
    """Of one that was moved to another disk and linked, retention removes the link alone."""
    mine = saver(tmp_path / "run", rank, keep=1)
    for step in (1, 2, 3):
        save_step(mine, rank, step)
        mine.wait()
        shutil.move(newest_checkpoint(tmp_path / "run") or "", tmp_path / f"moved{step}")
        (tmp_path / "run" / f"step-{step:08d}").symlink_to(tmp_path / f"moved{step}")
    assert steps_in(tmp_path / "run") == [3]
    save_step(mine, rank, 3)
    mine.wait()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000003"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "step-00000004").symlink_to(tmp_path / "empty")
    save_step(saver(tmp_path / "run", rank), rank, 4)
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
    save_step(mine, rank, 1)
    mine.wait()
    monkeypatch.setattr(retention.shutil, "rmtree", busy)
    save_step(mine, rank, 2)
    mine.wait()
    assert steps_in(tmp_path) == [2]
    monkeypatch.undo()
    saver(tmp_path, rank)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def steps_in(folder: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(folder)]


def test_some_stay_for_good(tmp_path: Path, rank: worlds.Rank) -> None:
    mine = saver(tmp_path, rank, keep=1, keep_every=4)
    for step in range(1, 11):
        save_step(mine, rank, step)
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


@pytest.mark.parametrize("state", ["complete", "incomplete"])
@pytest.mark.parametrize(
    "name", ["step-00000001", "step-00000001.old", "step-00000001.tmp", "step-00000001/hub.part"]
)
def test_clean_up_deletes_nothing_behind_a_link(tmp_path: Path, name: str, state: str) -> None:
    run, target = tmp_path / "run", tmp_path / "target"
    (target / "hub.part").mkdir(parents=True)
    for path in (target / "hub.part" / "precious", target / "precious"):
        path.write_text("x")
    if state == "complete":
        (target / DONE).write_text("x")
    before = sorted(target.rglob("*"))
    (run / name).parent.mkdir(parents=True)
    if name.endswith("hub.part"):
        (run / "step-00000001" / DONE).write_text("x")
    (run / name).symlink_to(target)
    retention.clean_up(run)
    assert sorted(target.rglob("*")) == before
    retention.restore_previous(run / "step-00000001.old", run / "step-00000001")
    retention.delete_or_warn(run / "step-00000001")
    assert sorted(target.rglob("*")) == before


def test_a_linked_final_gives_way_to_the_previous_checkpoint(tmp_path: Path) -> None:
    run, target = tmp_path / "run", tmp_path / "target"
    for folder in (target, run / "step-00000001.old"):
        folder.mkdir(parents=True)
    (target / "precious").write_text("x")
    (run / "step-00000001.old" / DONE).write_text("x")
    (run / "step-00000001").symlink_to(target)
    retention.clean_up(run)
    assert [path.name for path in run.iterdir()] == ["step-00000001"]
    assert (run / "step-00000001" / DONE).exists()
    assert not (run / "step-00000001").is_symlink()
    assert (target / "precious").exists()


def test_a_save_in_progress_is_written_through_no_link(tmp_path: Path, rank: worlds.Rank) -> None:
    run, target = tmp_path / "run", tmp_path / "target"
    target.mkdir()
    (target / "rank-tp00-dp00.json").write_text("precious")
    mine = saver(run, rank)
    (run / "step-00000001.tmp").symlink_to(target)
    save_step(mine, rank, 1)
    with pytest.raises(LinkError, match=r"step-00000001.tmp is a link to .*; remove it"):
        mine.wait()
    assert [path.name for path in target.iterdir()] == ["rank-tp00-dp00.json"]
    assert (target / "rank-tp00-dp00.json").read_text() == "precious"


@pytest.mark.parametrize("name", ["step-00000001", "step-00000001.tmp", "step-00000001.old"])
def test_folders_that_llamax_did_not_make_are_renamed_and_stay(
    tmp_path: Path, rank: worlds.Rank, name: str
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "manifest.json").write_text("{}")
    (tmp_path / name / "model.pt").write_text("precious")
    mine = saver(tmp_path, rank)
    save_step(mine, rank, 1)
    mine.wait()
    assert steps_in(tmp_path) == [1]
    assert (tmp_path / f"{name}.past" / "model.pt").read_text() == "precious"


def test_such_a_folder_that_appears_later_stays_as_well(tmp_path: Path, rank: worlds.Rank) -> None:
    mine = saver(tmp_path, rank)
    for name in ("step-00000001.tmp", "step-1-own.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.pt").write_text("precious")
    save_step(mine, rank, 2)
    mine.wait()
    assert (tmp_path / "step-00000001.tmp.past" / "model.pt").read_text() == "precious"
    assert (tmp_path / "step-1-own.tmp" / "model.pt").read_text() == "precious"


def test_all_that_a_killed_save_leaves_is_swept(tmp_path: Path, rank: worlds.Rank) -> None:
    mine = saver(tmp_path, rank, also_hf=True)
    save_step(mine, rank, 1)
    mine.wait()
    (left := tmp_path / "step-00000002.tmp").mkdir()
    names = [path.name for path in (tmp_path / "step-00000001").iterdir()]
    names += ["hub.part", ".manifest.json.partial", ".index.bin.partial", ".done.partial"]
    names += ["rank-tp00-dp00.json.part", "failed-pp01-tp00-dp01.json", ".nfs0000012f"]
    for name in names:
        (left / name).write_text("x")
    retention.clean_up(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
