"""Runs with spikes: skipped with their samples named, resumed to the bit, and gone back."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.spiky_llama import SpikyLlama, make_spiky
from support.tiny_run import config, hashes, log_of

from llamax.config.schema import Config
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import NotFinite
from llamax.train import train
from llamax.training.parts import Parts

SPIKES = (11, 17, 18, 25)
STEPS = 30


def spiky(
    folder: Path, spikes: tuple[int, ...] = SPIKES, steps: int = STEPS, **optim: Any
) -> Config:
    """A run of ``steps`` steps with spikes, reported every seventh step, saved every fifth."""
    cfg = config(folder / "data", folder / "run")
    settings = {"skip_spikes": "both", "spike_window": 16, **optim}
    cfg = replace(
        cfg,
        optim=replace(cfg.optim, **settings),
        run=replace(cfg.run, steps=steps, log_every=7, validate_every=0),
        checkpoint=replace(cfg.checkpoint, every=5),
    )
    make_spiky(folder / "data", cfg, spikes, 4 * (steps + 20))
    return cfg


def go(cfg: Config) -> None:
    train(cfg, Rendezvous(), Parts(SpikyLlama))


def forget(folder: Path, after: int) -> None:
    """Leave the run as if it had been killed before it saved again."""
    for path in (folder / "checkpoints").glob("step-*"):
        if int(path.name[5:13]) > after:
            shutil.rmtree(path)


def state(folder: Path, step: int) -> dict[str, Any]:
    manifest = folder / "checkpoints" / f"step-{step:08d}" / "manifest.json"
    found: dict[str, Any] = json.loads(manifest.read_text())["state"]
    return found


def window(folder: Path, step: int) -> Any:
    return state(folder, step)["spikes"]


def test_spikes_are_skipped_named_and_resumed_to_the_bit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("llamax").propagate = True
    cfg, folder = spiky(tmp_path), tmp_path / "run"
    go(cfg)
    records = {record["step"]: record for record in log_of(folder)}
    assert sorted(records) == sorted({7, 14, 21, 28, STEPS, *SPIKES})
    assert [step for step in records if "skipped_samples" in records[step]] == [*SPIKES]
    for step in SPIKES:
        samples = records[step]["skipped_samples"]
        assert len(samples) == 4
        assert f"samples {', '.join(map(str, samples))}" in caplog.text
    assert window(folder, STEPS)["skipped"] == 4
    assert len(window(folder, STEPS)["losses"]) == 16
    whole, log = hashes(folder, STEPS), log_of(folder)
    states = [window(folder, step) for step in (20, 25, STEPS)]
    forget(folder, 15)
    go(cfg)
    assert hashes(folder, STEPS) == whole
    assert log_of(folder) == log
    assert [window(folder, step) for step in (20, 25, STEPS)] == states


def test_without_the_feature_a_spike_is_an_update(tmp_path: Path) -> None:
    cfg = spiky(tmp_path, (11,), 12)
    go(replace(cfg, optim=replace(cfg.optim, skip_spikes="off")))
    assert not any("skipped_samples" in record for record in log_of(tmp_path / "run"))
    assert "spikes" not in state(tmp_path / "run", 12)


def test_a_run_goes_back_and_passes_over_the_samples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("llamax").propagate = True
    cfg, folder = spiky(tmp_path, (14, 16, 17, 18), 24, rewind=3), tmp_path / "run"
    go(cfg)
    assert (
        f"3 steps in a row were skipped: back to {folder}/checkpoints/step-00000015, and on with "
        "the samples after step 18"
    ) in caplog.text
    records = log_of(folder)
    assert [(r["step"], r.get("rewinds"), "skipped_samples" in r) for r in records] == [
        *((7, None, False), (14, None, True)),
        *((21, 1, False), (24, 1, False)),
    ]
    assert records[-1]["consumed_tokens"] == 32 * 4 * (24 + 3)
    last = state(folder, 24)
    assert (last["rewinds"], last["consumed_sequences"]) == (1, 4 * 27)
    assert last["spikes"]["skipped"] == 1, "of the history that led here"
    whole = hashes(folder, 24)
    for after in (15, 20):  # before it met the spike, and after it went back
        forget(folder, after)
        go(cfg)
        assert hashes(folder, 24) == whole
        assert log_of(folder) == records


def test_a_run_killed_in_a_row_of_skips_goes_back_as_well(tmp_path: Path) -> None:
    cfg = spiky(tmp_path, (14, 15, 16), 20, rewind=3, schedule="constant")
    cfg, folder = replace(cfg, checkpoint=replace(cfg.checkpoint, every=3)), tmp_path / "run"
    go(cfg)
    whole, log = hashes(folder, 20), log_of(folder)
    assert log[-1]["rewinds"] == 1
    shutil.rmtree(folder)
    go(replace(cfg, run=replace(cfg.run, steps=15)))
    assert state(folder, 15)["skipped_in_a_row"] == 2
    go(cfg)
    assert (hashes(folder, 20), log_of(folder)) == (whole, log)


def test_without_an_old_checkpoint_the_run_skips_on_and_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("llamax").propagate = True
    bad = tuple(range(10, 20))
    cfg = spiky(tmp_path, bad, 20, rewind=2, most_skipped=4)
    cfg = replace(cfg, checkpoint=replace(cfg.checkpoint, every=11))
    with pytest.raises(NotFinite, match=r"step 14: .* 5 in a row"):
        go(cfg)
    assert caplog.text.count("no checkpoint from before step 10: the run cannot go back") == 1


def test_a_run_that_could_not_go_back_once_goes_back_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("llamax").propagate = True
    cfg = spiky(tmp_path, (10, 11, 16, 17), 20, rewind=2)
    go(replace(cfg, checkpoint=replace(cfg.checkpoint, every=12)))
    assert caplog.text.count("no checkpoint from before step 10") == 1
    assert caplog.text.count("2 steps in a row were skipped: back to") == 1
    assert log_of(tmp_path / "run")[-1]["rewinds"] == 1


def test_a_run_goes_back_to_checkpoints_of_its_own_history_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Resumed from step 10, it has not been at the later ones that an earlier start left."""
    logging.getLogger("llamax").propagate = True
    cfg, folder = spiky(tmp_path, (18, 19), 20, rewind=2), tmp_path / "run/checkpoints"
    go(replace(cfg, run=replace(cfg.run, steps=16)))
    assert (folder / "step-00000015").exists()
    go(
        replace(
            cfg, checkpoint=replace(cfg.checkpoint, every=50, resume=str(folder / "step-00000010"))
        )
    )
    assert f"2 steps in a row were skipped: back to {folder}/step-00000010" in caplog.text


def test_a_run_that_goes_back_in_vain_ends(tmp_path: Path) -> None:
    cfg = spiky(tmp_path, tuple(range(12, 31)), 30, rewind=2)
    with pytest.raises(NotFinite, match=r"went back to .*step-00000010 3 times; lower optim\.lr"):
        go(cfg)
