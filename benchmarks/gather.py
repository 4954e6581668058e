"""Samples of 2049 tokens a CPU-second, beside memmap slices and items of an HF dataset.

    python benchmarks/gather.py [--rounds 7] [--tokens 67108864]

All read the same tokens at the same random places of a file in the page cache, on one core.
``rows`` are the stored tokens of a sample; ``int64`` what a training step takes, ids and labels.
Rounds are interleaved; the median of CPU time is reported with its ratio to each peer.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from llamax.backends import cpu
from llamax.data.batch_plan import BatchPlan
from llamax.data.header import Header
from llamax.data.loader import Loader, lay_out
from llamax.data.token_file import TokenFile, TokenWriter

S = 2048
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2**26, help="at least 262144")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cpu.keep_heap()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.tokens")
        with TokenWriter(path, Header("", 32000)) as writer:
            for _ in range(64):
                lengths = np.full(args.tokens // 64 // 1024, 1024)
                writer.add(rng.integers(0, 32000, lengths.sum()), lengths, 0)
        file = TokenFile(path)
        start, size = file.header.sections["tokens"]
        mapped = np.memmap(path, np.uint16, "r", start, (size // 2,))
        loader = Loader(file, BatchPlan(0, S, BATCH, BATCH))
        plain = Loader(file, BatchPlan(0, S, BATCH, BATCH), separate_documents=False)

        drawn = itertools.cycle(rng.integers(0, loader.samples - 1, (997, BATCH)))

        def places() -> np.ndarray:
            return next(drawn)

        def slices(kind: type) -> tuple[torch.Tensor, ...]:
            starts = (places() * S).tolist()
            if kind is np.uint16:
                return (torch.from_numpy(np.stack([mapped[i : i + S + 1] for i in starts])),)
            return tuple(
                torch.stack(
                    [torch.from_numpy(mapped[i + d : i + d + S].astype(kind)) for i in starts]
                )
                for d in (0, 1)
            )

        contenders: dict[str, Callable[[], object]] = {
            "llamax, rows": lambda: loader._windows[places()],
            "memmap slices, rows": lambda: slices(np.uint16),
            "llamax, int64 ids and labels": lambda: lay_out(plain.read(places())),
            "memmap slices, int64 ids and labels": lambda: slices(np.int64),
            "llamax, documents kept apart": lambda: lay_out(loader.read(places())),
        }
        try:
            import datasets

            rows = [{"ids": mapped[i * S : i * S + S + 1].tolist()} for i in range(2000)]
            items = datasets.Dataset.from_list(rows)
            contenders["HF datasets item"] = lambda: [
                items[i]["ids"] for i in (places() % 2000).tolist()
            ]
        except ImportError:
            print("(datasets is not installed: its line is left out)")
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(args.rounds):
            for name, contender in contenders.items():
                repeats = 2 if name.startswith("HF") else 30
                begin = time.process_time()
                for _ in range(repeats):
                    contender()
                times[name].append((time.process_time() - begin) / repeats / BATCH)
        verify = TokenFile(path, "read").verify(threads=1)
    median = {name: statistics.median(taken) for name, taken in times.items()}
    names = [n for n in ("numpy", "torch", "datasets") if find_spec(n)]
    print(f"Python {platform.python_version()}, " + ", ".join(f"{n} {version(n)}" for n in names))
    print("\n| contender | samples a CPU-second | M tokens/s | llamax, rows | llamax, int64 |")
    print("|---|---|---|---|---|")
    for name, taken in median.items():
        against = [taken / median[f"llamax, {k}"] for k in ("rows", "int64 ids and labels")]
        ratios = " | ".join(f"{ratio:.1f} times" for ratio in against)
        print(f"| {name} | {1 / taken:,.0f} | {(S + 1) / taken / 1e6:,.0f} | {ratios} |")
    print(f"\nchecksums verified at {verify / 1e9:.1f} GB/s on one core")


if __name__ == "__main__":
    main()
