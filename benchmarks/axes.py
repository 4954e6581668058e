"""Speed and memory of the mesh's axes: ZeRO-3 and pipelines beside torch's own, context ranks.

    python benchmarks/axes.py [SECTION ...] [--steps 8] [--only PART] [--layers N]

Contenders train the same Llama from the same weights on the same samples, in processes of one
thread.  They take turns, one step each (A B C A B C ...), and speeds are medians: once of the time
on the clock, where ranks that wait for each other count, and once of the processor time of the
busiest rank.  Memory is VmHWM of the largest rank, imports and the interpreter included.

    zero        the 57 M Llama (8 layers, 32000 rows), 4 sequences of 512: ZeRO-3, DDP, FSDP2
    zero-fair   the same, with our fused AdamW and settings of the heap for DDP and FSDP2
    hybrid      the same Llama on 4 ranks, cut over 2 of them: ZeRO-2 and 3, FSDP2 on a 2 x 2 mesh
    pipeline    16 layers and 4096 rows, 8 microbatches of 1 x 512: two stages, data 2, torch's
    context-N   8 layers and 4096 rows, one sequence of 1024 x N tokens over N = 2, 4 or 8 ranks:
                keys and values gathered, and passed around a ring
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from statistics import median

from peers.job import Job
from peers.race import Team, TeamError
from training import where

WARM = 2
TWO = {"ranks": 2, "threads": 1}
FAIR = {"fused": True, "keep_heap": True}
LONG = {"layers": 16, "vocab_size": 4096, "batch": 8, "micros": 8}


def contenders(section: str) -> tuple[str, dict[str, Job]]:
    """The contender that others are compared with, and all of them."""
    ours, ddp, fsdp2 = "ours:train", "sharded:ddp", "sharded:fsdp2"
    if section.startswith("zero"):
        fair = FAIR if section == "zero-fair" else {}
        return "DDP", {
            "llamax, ZeRO-3": Job(ours, zero=3, **TWO),
            "llamax, ZeRO-3, recompute": Job(ours, zero=3, recompute="full", **TWO),
            "DDP": Job(ddp, **TWO, **fair),
            "FSDP2": Job(fsdp2, **TWO, **fair),
            "FSDP2, recompute": Job(fsdp2, recompute="full", **TWO, **fair),
        }
    if section == "hybrid":
        four = {"ranks": 4, "threads": 1, "recompute": "full"}
        return "FSDP2, 2 x 2", {
            "llamax, ZeRO-3": Job(ours, zero=3, **four),
            "llamax, ZeRO-3 over 2": Job(ours, zero=3, zero_ranks=2, **four),
            "llamax, ZeRO-2 over 2": Job(ours, zero=2, zero_ranks=2, **four),
            "FSDP2, 2 x 2": Job(fsdp2, zero_ranks=2, **four, **FAIR),
        }
    if section.startswith("context"):
        ranks = int(section.removeprefix("context-"))
        shape = {"ranks": ranks, "context": ranks, "length": 1024 * ranks, "batch": 1, "threads": 1}
        return "gather", {
            f"{way}{', recompute full' * (mode == 'full')}": Job(
                ours, context_by=way, recompute=mode, vocab_size=4096, **shape
            )
            for mode in ("none", "full")
            for way in ("gather", "ring")
        }
    piped = Job("sharded:pipelining", pipeline=2, **TWO, **LONG)
    return "llamax, data 2", {
        "llamax, pipeline 2": Job(ours, pipeline=2, **TWO, **LONG),
        "llamax, data 2": Job(ours, **TWO, **{**LONG, "micros": 4}),
        "torch pipelining": piped,
        "torch pipelining, fused AdamW, our heap settings": replace(piped, **FAIR),
    }


def race(section: str, steps: int, only: str, layers: int, smallest: bool) -> None:
    """Print the table of a section."""
    base, jobs = contenders(section)
    teams = []
    for name, job in jobs.items():
        if only not in name and name != base:
            continue
        job = replace(job, layers=layers or job.layers)
        small = {"layers": 2, "length": 32, "vocab_size": 512} if smallest else {}
        try:
            teams.append(Team(name, replace(job, **small)))
        except TeamError as error:
            print(f"{name}: skipped ({error})", file=sys.stderr)
    for _ in range(steps):
        for team in teams:
            team.step()
    warm = min(WARM, steps - 1)
    (reference,) = (team for team in teams if team.name == base)
    print(f"\n| | tokens/s | speed of {base} | by processor time | peak GB | of {base} | loss |")
    print("|---|---|---|---|---|---|---|")
    for team in teams:
        job = team.job
        speed, cpu = (
            median(a / b for a, b in zip(theirs[warm:], ours[warm:], strict=True))
            for theirs, ours in (
                (reference.seconds, team.seconds),
                (reference.cpu_seconds, team.cpu_seconds),
            )
        )
        peak, base_peak = max(team.peak_bytes()), max(reference.peak_bytes())
        print(
            f"| {team.name} | {job.batch * job.length / team.typical('wall', warm):.0f} "
            f"| {speed:.2f} | {cpu:.2f} | {peak / 1e9:.2f} | {peak / base_peak:.2f} "
            f"| {team.losses[-1]:.5f} |",
            flush=True,
        )
    for team in teams:
        team.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    sections = [
        "zero",
        "zero-fair",
        "hybrid",
        "pipeline",
        *(f"context-{ranks}" for ranks in (2, 4, 8)),
    ]
    parser.add_argument("sections", nargs="*", help=f"of {' '.join(sections)}; all by default")
    parser.add_argument("--steps", type=int, default=8, help="steps of each, two of them warm-up")
    parser.add_argument("--only", default="", help="contenders whose name has this part")
    parser.add_argument("--layers", type=int, default=0, help="layers; by default as listed")
    parser.add_argument("--smallest", action="store_true", help="smallest size, only to try it")
    options = parser.parse_args()
    print(f"`{' '.join(['python', 'benchmarks/axes.py', *sys.argv[1:]])}`, {where()}")
    for section in options.sections or sections:
        race(section, options.steps, options.only, options.layers, options.smallest)


if __name__ == "__main__":
    main()
