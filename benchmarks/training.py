"""Time and memory of a training step: llamax beside its peers.

    python benchmarks/training.py [one tp dp bf16 recompute loss documents] [--steps 10]
        [--peers FOLDER ...] [--older FOLDER] [--only PART] [--clock wall|cpu] [--smallest]

The 57 M Llama (hidden 512, 8 layers, 8 heads, 4 key/value heads, feed-forward 1408, vocabulary
32000) from the same weights on the same data.  Every contender runs in processes of its own; they
take turns, one step each, a few at a time so that memory suffices, with llamax among them always.
Ratios are of llamax's median to the peer's, over the steps that they took in turn.  ``matmul`` is
the share of the rate of large fp32 products, measured between the steps (wall clock only).  Peak
memory is VmHWM, of the largest rank.  ``--peers`` are folders where litgpt, torchtitan and
picotron can be imported from (``pip install --no-deps --target``, or a clone); a line on stderr
names each that is not found.  ``--older`` adds the llamax of another checkout.

    one         one process of two threads
    tp          two ranks of one thread, tensor parallel, with sequence parallelism where there is
    dp          two ranks of one thread, data parallel
    bf16        bf16 on one process; transformers' native products are slow without bf16 units
    recompute   memory and time of each recompute mode, 2048 tokens a sequence
    loss        memory and time of the loss by size of its chunks, 2048 tokens a sequence
    documents   packed documents kept apart, against one document a sequence
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from peers.job import Job
from peers.race import BENCHMARKS, Team, TeamError

from llamax.config.flops import flops_per_token

WARM = 2  # steps that count for nothing
OURS, OLDER = "llamax", "older llamax"
SMALLEST = {"batch": 2, "length": 16, "layers": 1}
Contenders = dict[str, Job]


def contenders(section: str) -> Contenders:
    """The runs of a section, llamax first."""
    hub, fused = "hub:train", {"fused": True, "keep_heap": True}
    two = {"ranks": 2, "threads": 1}
    if section == "one":
        return {
            OURS: Job("ours:train"),
            "transformers, AdamW": Job(hub),
            "transformers, fused AdamW, our heap settings": Job(hub, **fused),
            "litgpt": Job("packages:litgpt"),
            "torchtitan's model": Job("packages:torchtitan"),
            "picotron": Job("packages:picotron"),
            "torch's own modules": Job("bare:train"),
        }
    if section == "tp":
        return {
            OURS: Job("ours:train", tensor=2, **two),
            "torch DTensor": Job("bare:dtensor", tensor=2, **two),
            "torch DTensor, loss_parallel": Job("bare:dtensor_loss_parallel", tensor=2, **two),
            "torch DTensor, loss_parallel, fused AdamW, our heap settings": Job(
                "bare:dtensor_loss_parallel", tensor=2, **two, **fused
            ),
            "picotron": Job("packages:picotron", tensor=2, **two),
            "llamax without sequence parallelism": Job(
                "ours:train", tensor=2, sequence_parallel=False, **two
            ),
            "llamax, recompute full": Job("ours:train", tensor=2, recompute="full", **two),
        }
    if section == "dp":
        return {
            OURS: Job("ours:train", **two),
            "DDP, transformers, AdamW": Job(hub, **two),
            "DDP, transformers, fused AdamW, our heap settings": Job(hub, **two, **fused),
        }
    if section == "bf16":
        return {
            OURS: Job("ours:train", dtype="bfloat16"),
            "llamax in fp32": Job("ours:train"),
            "transformers": Job(hub, dtype="bfloat16"),
        }
    if section == "recompute":
        long = Job("ours:train", batch=1, length=2048, layers=16)
        return {OURS: long} | {
            f"llamax, recompute {mode}": replace(long, recompute=mode)
            for mode in ("selective", "full")
        }
    if section == "loss":
        long = Job("ours:train", batch=2, length=2048, layers=2)
        return {OURS: long} | {
            f"llamax, chunks of {tokens} tokens": replace(long, chunk_tokens=tokens)
            for tokens in (4096, 1024, 256)
        }
    return {
        OURS: Job("ours:train"),
        "llamax, 4 documents a sequence": Job("ours:train", documents=4),
        "llamax, 16 documents a sequence": Job("ours:train", documents=16),
    }


@dataclass(frozen=True)
class Result:
    """A contender's figures; ``ratio`` and ``difference`` of loss are to llamax's in turn."""

    name: str
    tokens_per_s: float
    ratio: float
    matmul: float
    peak: int
    memory_ratio: float
    loss: float
    difference: float


def race(
    section: str,
    smallest: bool,
    only: str,
    steps: int,
    together: int,
    paths: Sequence[str],
    older: Path | None,
    clock: str,
    limit_s: float,
) -> Iterator[Result | str]:
    """All results of a section, as they come in; a string says why a contender is missing."""
    chosen = contenders(section)
    if smallest:
        chosen = {label: replace(job, **SMALLEST) for label, job in chosen.items()}
    if older:
        chosen[OLDER] = chosen[OURS]
    (name, job), *others = chosen.items()
    others = [(label, peer) for label, peer in others if only in label]
    tokens = job.batch * job.length
    flops = flops_per_token(job.model, job.length)
    ours, warm = Team(name, job), min(WARM, steps - 1)
    rates: list[float] = []
    for first in range(0, len(others), together):
        rivals = []
        for label, peer in others[first : first + together]:
            try:
                rivals.append(Team(label, peer, paths, older if label == OLDER else None))
            except TeamError as error:
                yield f"{label}: skipped ({error})"
        if not rivals:
            continue
        begun = len(ours.seconds)
        started = time.monotonic()
        for number in range(steps):
            if number > warm and time.monotonic() - started > limit_s:
                break
            for team in (ours, *rivals):
                team.step()
            rates.append(ours.matmul_flops())
        mine = ours.typical(clock, begun + warm)
        for team in rivals:
            theirs = team.typical(clock, warm)
            rate = median(rates[begun:])
            peak, our_peak = max(team.peak_bytes()), max(ours.peak_bytes())
            gaps = [abs(a - b) for a, b in zip(ours.losses, team.losses, strict=False)]
            yield Result(
                team.name,
                tokens / theirs,
                theirs / mine,
                tokens / theirs * flops / rate,
                peak,
                our_peak / peak,
                team.losses[-1],
                max(gaps),
            )
            team.stop()
    if not rates:  # no peer is here: llamax alone
        for _ in range(steps):
            ours.step()
            rates.append(ours.matmul_flops())
    mine = ours.typical(clock, warm)
    peak = max(ours.peak_bytes())
    rate = median(rates)
    speed = tokens / mine
    yield Result(
        name,
        speed,
        1.0,
        speed * flops / rate,
        peak,
        1.0,
        ours.losses[min(steps, len(rates)) - 1],
        0.0,
    )
    ours.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    sections = ["one", "tp", "dp", "bf16", "recompute", "loss", "documents"]
    parser.add_argument("sections", nargs="*", help=f"of {' '.join(sections)}; all by default")
    parser.add_argument("--steps", type=int, default=10, help="steps of each, two of them warm-up")
    parser.add_argument("--only", default="", help="peers whose name has this part")
    parser.add_argument("--together", type=int, default=2, help="peers that take turns at once")
    parser.add_argument("--peers", nargs="*", default=[], help="folders to import peers from")
    parser.add_argument("--older", type=Path, help="another checkout of llamax")
    parser.add_argument("--limit-s", type=float, default=600, help="of one group of peers, about")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--smallest", action="store_true", help="smallest size, only to try it")
    options = parser.parse_args()
    print(f"`{' '.join(['python', 'benchmarks/training.py', *sys.argv[1:]])}`, {where()}\n")
    for section in options.sections or sections:
        print(f"{section}:\n")
        print("| | tokens/s | llamax is | matmul | peak GB | of it llamax | loss | differs |")
        print("|---|---|---|---|---|---|---|---|")
        for found in race(
            section,
            options.smallest,
            options.only,
            options.steps,
            options.together,
            options.peers,
            options.older,
            options.clock,
            options.limit_s,
        ):
            if isinstance(found, str):
                print(found, file=sys.stderr)
                continue
            share = f"{found.matmul:.0%}" if options.clock == "wall" else "-"
            print(
                f"| {found.name} | {found.tokens_per_s:.0f} | {found.ratio:.2f}x "
                f"| {share} | {found.peak / 1e9:.2f} | {found.memory_ratio:.2f} "
                f"| {found.loss:.5f} | {found.difference:.0e} |",
                flush=True,
            )
        print()


def where() -> str:
    """Commit, versions and machine."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=BENCHMARKS, capture_output=True, text=True
    )
    packages = ("torch", "transformers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"commit {described.stdout.strip()}, {versions}, {platform.machine()}"


if __name__ == "__main__":
    main()
