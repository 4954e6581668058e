"""Kill ranks with SIGKILL while they save and rotate checkpoints; look at what is left.

    PYTHONPATH=tests python -m support.kill_saving --ranks 4 --kills 200

Every rank is a fork of this process that saves step after step, each full of its own number.  A
kill comes after a random time, or at a random one of the calls that change the disk.  Afterwards
the newest checkpoint must be at least the last one that was reported as committed, every complete
one must verify and hold its own number everywhere, and a new ``Saver`` must leave nothing else.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import support.checkpoints as worlds
from llamax.checkpoint import Checkpoint, Saver, listing
from llamax.config.schema import CheckpointConfig
from llamax.config.step_folders import list_checkpoints, step_of

MODEL = worlds.llama(layers=1)
MESHES = {1: (1, 1), 2: (1, 2), 4: (2, 2)}
CHANGING = ("open", "pwrite", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir")
CALLS = 400  # a rank makes some 60 of them for a save


def saver(folder: Path, rank: worlds.Rank) -> Saver:
    return Saver(folder, rank.axes, rank.sharded, CheckpointConfig(keep=2), timeout_s=300)


def committed(folder: Path) -> int:
    """The last step that rank 0 has reported."""
    path = folder / "committed"
    return int(path.read_text() or 0) if path.exists() else 0


def report(folder: Path, step: int) -> None:
    beside = folder / "committed.part"
    beside.write_text(str(step))
    os.replace(beside, folder / "committed")


def live(folder: Path, index: int, rank: worlds.Rank, first: int, go: int, calls: int) -> None:
    """The life of a rank: save step after step until the end comes."""
    if calls:
        suicide(calls)
    if index > 0:
        os.read(go, 1)  # rank 0 has swept
    mine = saver(folder, rank)
    if index == 0:
        os.write(go, b"x" * 8)
    step = first
    while True:
        for share in rank.shares.values():
            for tensor in share.values():
                tensor.fill_(step)
        mine.save(step, rank.owned, {}, MODEL.to_hub("float32"), "[run]\n")
        mine.wait()
        if index == 0:
            report(folder, step)
        while committed(folder) < step:
            time.sleep(0.001)
        step += 1


def suicide(calls: int) -> None:
    """Die at the ``calls``-th call that changes the disk, before it or after it."""
    left = [calls]

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] <= 0 and calls % 2:  # not ==: several threads count
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **options)
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in CHANGING:
        setattr(os, name, deadly(getattr(os, name)))


def spawn(folder: Path, ranks: list[worlds.Rank], first: int, deadly: int, calls: int) -> list[int]:
    """Fork the ranks; one of them is to die by its own hand if ``calls``."""
    hear, tell = os.pipe()
    children = []
    for index, rank in enumerate(ranks):
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)
                go = tell if index == 0 else hear
                live(folder, index, rank, first, go, calls if index == deadly else 0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)  # only a defect comes here
        children.append(child)
    os.close(hear)
    os.close(tell)
    return children


def look(folder: Path, rank: worlds.Rank) -> str:
    """Describe what is wrong with the files that killed ranks left; empty if nothing is."""
    at_least = committed(folder)
    for swept in (False, True):
        if swept:
            saver(folder, rank)
            names = {path.name for path in folder.glob("step-*")}
            if names != {path.name for path in list_checkpoints(folder)}:
                return f"leftovers after the sweep: {sorted(names)}"
        newest = listing.newest_checkpoint(folder)
        if at_least and (newest is None or step_of(newest) < at_least):
            return f"step {at_least} was committed, the newest is {newest}"
        for path in list_checkpoints(folder):
            source = Checkpoint(path)
            source.verify()
            for name in source.names():
                for kind in source.kinds(name):
                    if not (source.read(name, kind) == step_of(path)).all():
                        return f"{path}: {name} ({kind}) is of another step"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, choices=MESHES, default=1)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--folder", help="where to work; a folder in memory is quicker")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    torch.set_num_threads(1)
    values = worlds.wholes(MODEL)
    ranks = worlds.world(MODEL, *MESHES[args.ranks], True, values)
    bad = 0
    saved = 0
    with tempfile.TemporaryDirectory(prefix="kill-saving-", dir=args.folder) as temporary:
        folder = Path(temporary)
        for kill in range(args.kills):
            newest = listing.newest_checkpoint(folder)
            first = step_of(newest) + 1 if newest else 1
            report(folder, first - 1)
            calls = chance.randint(1, CALLS) if kill % 2 else 0
            deadly = chance.randrange(len(ranks))
            children = spawn(folder, ranks, first, deadly, calls)
            if calls:
                child, status = os.waitpid(-1, 0)  # the deadly one, or a defect
                children.remove(child)
                bad += not os.WIFSIGNALED(status)
            else:
                time.sleep(chance.uniform(0.0, 0.5))
            chance.shuffle(children)
            for child in children:
                os.kill(child, signal.SIGKILL)
            for child in children:
                _, status = os.waitpid(child, 0)
                bad += not os.WIFSIGNALED(status)
            found = look(folder, ranks[0])
            if found:
                bad += 1
                print(f"kill {kill}: {found}", flush=True)
            last = listing.newest_checkpoint(folder)
            saved += step_of(last) - first + 1 if last else 0
    print(f"{args.kills} kills, {args.ranks} ranks, {saved} checkpoints committed: {bad} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
