"""Time of imports, beside torch's own.

    python benchmarks/imports.py [--rounds 9]

Fresh interpreters take turns; medians in seconds, bare start-up of Python subtracted.  ``cpu`` is
processor time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from statistics import median

WANTED = {
    "python": "",
    "torch": "import torch",
    "llamax, its model": "import llamax; from llamax.model.llama import Llama",
    "llamax, all of training": "import llamax.train",
    "llamax.config.schema, without torch": "import llamax.config.schema",
}


def timed(statement: str) -> tuple[float, float]:
    """Wall and processor seconds of a fresh interpreter."""
    before, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    wall, after = time.perf_counter() - start, os.times()
    used = after.children_user + after.children_system
    return wall, used - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="turns after the first; 0: only that")
    rounds = parser.parse_args().rounds
    taken = [
        {name: timed(statement) for name, statement in WANTED.items()} for _ in range(rounds + 1)
    ][min(1, rounds) :]
    python, torch = (
        [median(turn[name][clock] for turn in taken) for clock in (0, 1)]
        for name in ("python", "torch")
    )
    print("| import | wall s | of torch's | cpu s | of torch's |\n|---|---|---|---|---|")
    for name in list(WANTED)[1:]:
        cells = []
        for clock in (0, 1):
            own = median(turn[name][clock] for turn in taken) - python[clock]
            cells += [f"{own:.2f}", f"{own / (torch[clock] - python[clock]):.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
