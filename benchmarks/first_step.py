"""Time from the command to the line of the first step: the demo's recipe on 4 ranks.

    python benchmarks/first_step.py [--beside TREE] [--rounds 5]

torchrun with ``llamax.train`` of this source tree and of ``--beside`` (a checkout of an earlier
commit), and ``llamax train --ranks 4``, take turns; medians, and the ratios to the first row.  CPU
seconds are those of all processes until then.  Bytecode is cached, as it is after a first start.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parents[1]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "4", "-m", "llamax.train"]
RANKS = ["-m", "llamax", "train", "--ranks", "4"]
SETTINGS = ["--config", "demo", "--run.steps=99", "--run.log_every=1", "--run.progress=off"]


def prepare(folder: Path) -> None:
    """A dataset of llamax's own sources."""
    words = ["-m", "llamax", "prepare", str(HERE / "llamax"), "--glob", "*.py", "--out"]
    more = ["--train-tokenizer", "4096", "--validation", "0.05", "--bos"]
    subprocess.run([sys.executable, *words, str(folder), *more], check=True, capture_output=True)


def processes() -> dict[int, tuple[int, float]]:
    """The parent, and the CPU seconds with those of ended children, of every process."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks = sum(map(int, fields[11:15]))
        found[int(stat.parent.name)] = int(fields[1]), ticks / os.sysconf("SC_CLK_TCK")
    return found


def timed(tree: Path, words: list[str], data: Path) -> tuple[float, float]:
    """Wall and CPU seconds from the start of a program to the line of its first step."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONUNBUFFERED": "1", "PYTHONPYCACHEPREFIX": str(data.parent / "bytecode")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as folder:
        places = [f"--data.path={data}", f"--run.folder={folder}/run"]
        start = time.perf_counter()
        program = subprocess.Popen(
            [sys.executable, *words, *SETTINGS, *places],
            cwd=folder,  # so that `-m` finds the tree of PYTHONPATH
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert program.stdout is not None
        lines = []
        for line in program.stdout:
            lines.append(line)
            if " 1/99 " in line:
                break
        else:
            raise SystemExit("".join(lines))
        wall, now, own = time.perf_counter() - start, processes(), {program.pid}
        while more := {pid for pid, (parent, _) in now.items() if parent in own} - own:
            own |= more
        for pid in own:
            os.kill(pid, signal.SIGKILL)
        program.wait()
        return wall, sum(now[pid][1] for pid in own)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--beside", type=Path, help="another source tree")
    parser.add_argument("--rounds", type=int, default=5, help="turns after the first; 0: only that")
    options = parser.parse_args()
    starts = {"torchrun": (HERE, TORCHRUN), "llamax train --ranks 4": (HERE, RANKS)}
    if options.beside:
        starts = {f"torchrun, {options.beside}": (options.beside.resolve(), TORCHRUN)} | starts
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare(data)
        turns = [
            {name: timed(*start, data) for name, start in starts.items()}
            for _ in range(options.rounds + 1)
        ][min(1, options.rounds) :]
    print("| start | wall s | of the first | cpu s | of the first |\n|---|---|---|---|---|")
    first = next(iter(starts))
    for name in starts:
        cells = []
        for clock in (0, 1):
            taken, other = (median(turn[who][clock] for turn in turns) for who in (name, first))
            cells.append(f"{taken:.2f} | {taken / other:.2f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
