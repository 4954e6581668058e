"""Time of gloo's own collectives and of llamax's, which are sends and receives.

    python benchmarks/collectives.py [--ranks 2] [--rounds 15] [--mebibytes 0.25 1 4 16 64]

``ours`` is ``llamax.backends.torch_axes.GlooAxis``; ``gloo`` its base class, which calls
gloo's verb of the name.  The two take turns on the same fp32 tensors; times are medians in
milliseconds of the slowest rank.  Sizes are of the whole tensor: what a rank has after
all_gather, or before reduce_scatter.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from peers.race import free_port
from torch import Tensor, multiprocessing

from llamax.backends import choose
from llamax.backends.torch_axes import GlooAxis, TorchAxis
from llamax.parallel.mesh import Mesh
from llamax.parallel.rendezvous import Rendezvous

VERBS = ("all_gather", "reduce_scatter", "all_reduce")
MEBIBYTES = [0.25, 1, 4, 16, 64]


def rank(me: int, ranks: int, port: int, rounds: int, mebibytes: list[float]) -> None:
    where = Rendezvous(me, ranks, me, ranks, port=port)
    backend = choose("cpu", where, 1)
    with backend.joined(Mesh(tp=ranks), 300.0) as axes:
        ours = axes.tp
        assert isinstance(ours, GlooAxis)
        gloo = TorchAxis(ours.name, ours.ranks, backend.device, ours.group)
        if me == 0:
            print(f"torch {torch.__version__}, {ranks} ranks of one thread\n")
            print("| verb | MiB | gloo ms | ours ms | gloo / ours |\n|---|---|---|---|---|")
        for verb in VERBS:
            for size in mebibytes:
                whole = torch.randn(ranks, int(size * 2**18) // ranks)
                x = whole[me : me + 1] if verb == "all_gather" else whole
                taken: dict[str, list[float]] = {"gloo": [], "ours": []}
                for _ in range(rounds):
                    for name, axis in (("gloo", gloo), ("ours", ours)):
                        taken[name].append(timed(axis, verb, x, ours))
                theirs, mine = (
                    1e3 * median(taken[name][min(1, rounds - 1) :]) for name in ("gloo", "ours")
                )
                if me == 0:
                    print(f"| {verb} | {size} | {theirs:.2f} | {mine:.2f} | {theirs / mine:.2f} |")


def timed(axis: TorchAxis, verb: str, x: Tensor, all_ranks: TorchAxis) -> float:
    """Seconds of the slowest rank."""
    all_ranks.all_reduce(torch.zeros(1))
    start = time.perf_counter()
    if verb == "all_reduce":
        axis.all_reduce(x)
    else:
        getattr(axis, verb)(x, 0)
    seconds = torch.tensor(time.perf_counter() - start)
    return all_ranks.all_reduce(seconds, "max").item()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--mebibytes", type=float, nargs="+", default=MEBIBYTES, metavar="MIB")
    options = parser.parse_args()
    arguments = (options.ranks, free_port(), options.rounds, options.mebibytes)
    multiprocessing.spawn(rank, arguments, nprocs=options.ranks)


if __name__ == "__main__":
    main()
