"""CPU seconds and peak memory at the sizes of large runs, beside another source tree.

    python benchmarks/scale.py [--beside TREE] [--only WORDS] [--rounds 3] [--folder DIR]

Each task runs in a fresh process, in turn from this source tree and from ``--beside`` (a checkout
of an earlier commit); medians, and the ratio of this tree to the other.  The processes have one
thread.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from llamax.config.load import dump_config, load_config
from llamax.data.header import Header
from llamax.data.token_file import TokenWriter
from llamax.training.metrics import Record

HERE = Path(__file__).resolve().parents[1]


class Sizes(NamedTuple):
    """How large the tasks are."""

    records: int = 10**6
    ranks: int = 16384
    documents: int = 10**7
    datasets: int = 200


SMALLEST = Sizes(records=200, ranks=16, documents=1000, datasets=3)


class Task(NamedTuple):
    """``make`` writes the input into a folder; ``code`` is what a fresh process then runs there."""

    make: Callable[[Path, Sizes], None]
    code: str


def command(*words: str) -> str:
    """Python code that runs a command of llamax."""
    module = f"from llamax.cli import {words[0]} as command\n"
    return module + f"raise SystemExit(command.main({list(words[1:])!r}))"


# --- runs to look at ------------------------------------------------------------------------------


def make_run(folder: Path, records: int, ranks: int) -> None:
    run = folder / "run"
    run.mkdir()
    options = [f"--run.steps={records}", f"--run.folder={run}"]
    (run / "config.toml").write_text(dump_config(load_config("demo", options)))
    (run / "environment.json").write_text(json.dumps({"ranks": ranks}))
    draw = random.Random(0).random
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, records + 1):
            seconds, loss = step * 1.25 + draw(), 2 + 10 / step**0.3 + draw() / 10
            rates = (3e-4 * draw(), 4e5 + 1e4 * draw(), 12345678901, 0.41 + draw() / 100)
            validation = loss + 0.1 if step % 1000 == 0 else None
            tokens = step * 524288
            record = Record(step, tokens, seconds, 1.25, loss, draw() * 2, *rates, validation)
            file.write(record.to_json() + "\n")
    if ranks == 1:
        return
    (run / "heartbeats").mkdir()
    for rank in range(ranks):
        beat = {"beat": 3, "step": records, "host": f"node{rank // 32}", "pid": 1}
        (run / f"heartbeats/rank-{rank:05d}").write_text(json.dumps(beat).ljust(2048))


def many_records(folder: Path, sizes: Sizes) -> None:
    make_run(folder, sizes.records, 1)


def many_ranks(folder: Path, sizes: Sizes) -> None:
    make_run(folder, 100, sizes.ranks)


# --- data ----------------------------------------------------------------------------------------


def many_documents(folder: Path, sizes: Sizes) -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 1.2, sizes.documents).astype(np.int64)
    starts = np.append(0, np.cumsum(np.clip(lengths, 2, 20000)))
    np.save(folder / "documents.npy", starts)


def many_datasets(folder: Path, sizes: Sizes) -> None:
    for number in range(sizes.datasets):
        lengths = np.random.default_rng(number).integers(20, 400, 400)
        with TokenWriter(folder / f"{number}.tokens", Header("", 1000)) as writer:
            tokens = np.arange(lengths.sum()) % 1000
            writer.add(tokens.astype(np.uint16), lengths, len(tokens))


PACK = """
import numpy as np
from llamax.data.packing import Packs

class Documents:
    masked, path, documents = False, "documents.npy", np.load("documents.npy")
    identity, num_documents = str(path), len(documents) - 1
    def touch(self, *_): pass
    def bounds(self, documents):
        return self.documents[np.stack([documents, documents + 1], 1)].T

Packs(Documents(), LENGTH)
"""
FIRST_RANK = """
import tempfile
tempfile.tempdir = tempfile.mkdtemp(dir=".")  # where nothing is packed yet
"""
BLEND = """
from pathlib import Path
from llamax.data.batch_plan import BatchPlan
from llamax.data.blended_loader import BlendedLoader
from llamax.data.loader import Loader
from llamax.data.token_file import TokenFile

plan = BatchPlan(0, 512, 256, 32)
parts = [Loader(TokenFile(path), plan) for path in sorted(Path().glob("*.tokens"))]
blend = BlendedLoader(parts, [1.0] * len(parts), plan)
for _ in range(STEPS):
    blend.step()
"""

TASKS = {
    "watch, many records": Task(many_records, command("watch", "run", "--once")),
    "report, many records": Task(many_records, command("report", "run")),
    "plot, many records": Task(many_records, command("plot", "run")),
    "watch, many ranks": Task(many_ranks, command("watch", "run", "--once")),
    "best-fit packing, 2048": Task(many_documents, FIRST_RANK + PACK.replace("LENGTH", "2048")),
    "packing, 2048, next rank": Task(many_documents, PACK.replace("LENGTH", "2048")),
    "best-fit packing, 8192": Task(many_documents, FIRST_RANK + PACK.replace("LENGTH", "8192")),
    "packing, 8192, next rank": Task(many_documents, PACK.replace("LENGTH", "8192")),
    "a blend, opened": Task(many_datasets, BLEND.replace("STEPS", "0")),
    "a blend, opened, 200 steps": Task(many_datasets, BLEND.replace("STEPS", "200")),
}


# --- measuring ------------------------------------------------------------------------------------


def measure(code: str, tree: Path, folder: Path) -> tuple[float, float]:
    """CPU seconds and peak megabytes of a fresh process that runs ``code`` from a source tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "TMPDIR": "."}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, env=environment, stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{tree}: ended with status {status}:\n{code}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--beside", type=Path, metavar="TREE", help="another source tree")
    parser.add_argument("--only", default="", metavar="WORDS", help="tasks whose name has these")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--smallest", action="store_true", help="smallest size, only to try it")
    options = parser.parse_args()
    sizes = SMALLEST if options.smallest else Sizes()
    trees = [HERE, *([options.beside.resolve()] if options.beside else [])]
    print(f"{sizes}\n\n| task | CPU s | MB | beside: CPU s | MB | ratio of CPU s | of MB |")
    print("|---|---|---|---|---|---|---|")
    made: dict[Callable[[Path, Sizes], None], Path] = {}
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="scale-") as temporary:
        for name, task in TASKS.items():
            if options.only not in name:
                continue
            if task.make not in made:
                made[task.make] = Path(temporary) / str(len(made))
                made[task.make].mkdir()
                task.make(made[task.make], sizes)
            turns = [
                [measure(task.code, tree, made[task.make]) for tree in trees]
                for _ in range(options.rounds)
            ]
            found = [
                [median(turn[t][i] for turn in turns) for i in (0, 1)] for t in range(len(trees))
            ]
            cells = [f"{cpu:.2f} | {size:.0f}" for cpu, size in found]
            ratios = (
                [f"{here / there:.3f}" for here, there in zip(*found, strict=True)]
                if len(found) > 1
                else []
            )
            print(f"| {name} | {' | '.join([*cells, *ratios])} |", flush=True)


if __name__ == "__main__":
    main()
