"""Drills on files: killed while saving, damaged, without room, resumed at every step."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import support.checkpoints as worlds
from support import tiny_run
from support import training_jobs as jobs
from support.adapters import MODEL as TUNED
from support.adapters import base_folder
from support.scripts import run_script

from llamax.checkpoint import Checkpoint, newest_checkpoint
from llamax.cli.train import main
from llamax.config.schema import Config
from llamax.data.dataset import open_dataset
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import LlamaxError, NoRoom
from llamax.runtime.logging import logger
from llamax.runtime.process import run_main
from llamax.train import train


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [1, 4])
def test_killed_while_saving(ranks: int, full: bool, report: Callable[[str], None]) -> None:
    kills = 200 if full else 4
    memory = ["--folder", "/dev/shm"] if Path("/dev/shm").is_dir() else []
    said = run_script("kill_saving", "--ranks", str(ranks), "--kills", str(kills), *memory)
    report(f"SIGKILL while saving and rotating: {said.strip()}")


@pytest.mark.timeout(3600)
def test_mutations(full: bool, report: Callable[[str], None]) -> None:
    for line in run_script("mutations", "--each", "1000" if full else "15").splitlines():
        report(line)


def damages(path: Path, flips: int, chance: random.Random) -> Iterator[str]:
    """Flip bits of a file, then cut it, then lose it; it is whole again in the end."""
    whole = path.read_bytes()
    for at in sorted({0, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(flips))}):
        changed = bytearray(whole)
        changed[at] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        yield f"bit {at}"
    path.write_bytes(whole[: chance.randrange(len(whole))])
    yield "cut"
    path.write_bytes(whole)


@pytest.mark.timeout(3600)
def test_every_damage_is_refused_and_named(
    dataset: Path, tmp_path: Path, full: bool, report: Callable[[str], None]
) -> None:
    chance, model, number = random.Random(0), worlds.llama(), 0
    ranks = worlds.world(model, 2, 2, True, worlds.wholes(model))
    for step in (1, 2):
        checkpoint = worlds.save(tmp_path, model, ranks, step)
    data = shutil.copytree(dataset, tmp_path / "dataset")

    def load() -> None:
        Checkpoint(checkpoint, verify=False).verify()
        worlds.load(Checkpoint(checkpoint), worlds.world(model, 1, 1, True, None))

    for act, folder in ((load, checkpoint), (lambda: open_dataset(data, "start"), data)):
        act()
        for path in sorted(folder.iterdir()):
            for damage in damages(path, 60 if full else 3, chance):
                number += 1
                with pytest.raises(LlamaxError) as caught:
                    act()
                line = str(caught.value)
                assert path.name in line, f"{path.name}, {damage}: {line}"
                if folder == checkpoint:
                    assert "the newest intact checkpoint is" in line, f"{damage}: {line}"
                    assert "step-00000001" in line
        act()
    report(f"flipped, cut: {number} damages of every file, all refused with the file's name: ok")


def variants(dataset: Path, base: Path) -> dict[str, tuple[int, Config]]:
    """What is resumed at every step: ranks and configuration."""
    plain = tiny_run.config(dataset, base)

    def of(**changes: dict[str, object]) -> Config:
        changed = {name: replace(getattr(plain, name), **it) for name, it in changes.items()}
        return replace(plain, **changed)

    lora = {"method": "lora", "r": 4, "dropout": 0.1}
    tuned = {"model": vars(TUNED), "checkpoint": {"init_from": str(base)}}
    narrow = {"dtype": "bfloat16"}
    return {
        "plain": (1, plain),
        "bfloat16": (1, of(run=narrow)),
        "bfloat16, recompute full": (1, of(run={**narrow, "recompute": "full"})),
        "recompute selective": (1, of(run={"recompute": "selective"})),
        "two samples at once, twice a step": (1, of(data={"micro_batch": 2})),
        "saved before training goes on": (1, of(checkpoint={"background": False})),
        "lora": (1, of(finetune=lora, **tuned)),
        "lora, bfloat16, recompute full": (
            1,
            of(finetune=lora, run={**narrow, "recompute": "full"}, **tuned),
        ),
        "qlora": (1, of(finetune={**lora, "method": "qlora"}, **tuned)),
        "tensor 2": (2, of(parallel={"tensor": 2})),
        "data 2, bfloat16": (2, of(run=narrow)),
        "data 2, no ZeRO": (2, of(parallel={"zero": 0})),
    }


@pytest.mark.timeout(3600)
def test_resuming_at_every_step(
    dataset: Path, tmp_path: Path, full: bool, report: Callable[[str], None]
) -> None:
    """The log and the last checkpoint of a resumed run are those of one that never stopped."""
    steps, base = 12, tmp_path / "base"
    base_folder(base)
    stops = range(1, steps) if full else (1, 6, 11)
    chosen = variants(dataset, base)
    for number, (name, (ranks, config)) in enumerate(chosen.items()):
        if number and not full:
            break
        folder = tmp_path / f"run{number}"
        cfg = replace(config, run=replace(config.run, folder=str(folder), steps=steps))
        path = tiny_run.write(cfg, tmp_path / f"{number}.toml")

        def run(ranks: int = ranks, cfg: Config = cfg, path: Path = path) -> None:
            if ranks == 1:
                train(cfg, Rendezvous())
            else:
                job = jobs.torchrun(ranks, path, Path(cfg.run.folder))
                assert job.end() == 0, job.said()

        run()
        expected = tiny_run.log_of(folder), tiny_run.hashes(folder, steps)
        for stopped in stops:
            for later in range(stopped + 1, steps + 1):
                shutil.rmtree(folder / f"checkpoints/step-{later:08d}")
            run()
            found = tiny_run.log_of(folder), tiny_run.hashes(folder, steps)
            assert found == expected, f"{name}, resumed after step {stopped}"
        report(f"resumed after {len(stops)} steps of {steps}, {name}: bytes equal: ok")


def run_in(folder: Path, dataset: Path, steps: int, **checkpoint: object) -> list[str]:
    path = tiny_run.write(jobs.config(dataset, folder, steps, **checkpoint), folder / "c.toml")
    return ["--config", str(path)]


def test_a_limit_on_file_sizes(
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    report: Callable[[str], None],
) -> None:
    """The first checkpoint fits; then the limit comes, as a quota does."""
    assert run_main(main, run_in(tmp_path, dataset, 2)) == 0
    first = newest_checkpoint(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        # The save of step 4 fails in the background; that of step 6 waits for it at the latest.
        assert run_main(main, run_in(tmp_path, dataset, 8, every=2)) == NoRoom.exit_code
        stopped = capsys.readouterr().err
        assert tiny_run.log_of(tmp_path)[-1]["step"] <= 6
        on = run_in(tmp_path, dataset, 8, every=2, on_failure="continue")
        assert run_main(main, on) == NoRoom.exit_code, "the last checkpoint is missing"
        went_on = capsys.readouterr().err
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        logger.handlers.clear()
    line = r"no room for .* \(File too large\): (\d+) bytes needed, (\d+) free; .*step (\d) is not"
    assert re.search(line, stopped), stopped
    assert "training goes on" in went_on
    assert tiny_run.log_of(tmp_path)[-1]["step"] == 8
    assert newest_checkpoint(tmp_path) == first
    assert first is not None
    Checkpoint(first).verify()
    report("RLIMIT_FSIZE: previous checkpoint loads, bytes told, exit 3, stops or goes on: ok")


def test_a_full_disk(
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    report: Callable[[str], None],
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        argv = run_in(disk, dataset, 100, every=1, keep=0)
        assert run_main(main, argv) == NoRoom.exit_code
        said = capsys.readouterr().err
        assert re.search(r"\(No space left on device\): \d+ bytes needed, \d+ free", said), said
        last = newest_checkpoint(disk)
        assert last is not None
        Checkpoint(last).verify()
        assert f"{last} stays" in said
        assert not list((disk / "checkpoints").glob("*.tmp"))
    finally:
        logger.handlers.clear()
        os.sync()
        subprocess.run(["umount", "-l", str(disk)], check=True)
    report(f"8 MB tmpfs full after {last.name}: it loads, bytes told, exit 3: ok")
