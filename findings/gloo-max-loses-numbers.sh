#!/usr/bin/env bash
# One NaN makes gloo's maximum over ranks lose larger numbers: that of 0, NaN, 2, 3 can be 0.
#
# Seen with torch 2.13.0, four ranks, backend gloo, float32.
#
# all_reduce(MAX) keeps the number it holds where a comparison fails, and each comparison with NaN
# fails.  The order in which ranks are added depends on the element's place, so equal inputs give
# four results in one tensor: NaN, 3, and, where NaN took the place of 2 and 3 and was then dropped
# itself, 0.  One element lies in the first place: there the NaN of any rank but the first is lost
# with all numbers that it met.  MIN is the same.  torch.max and torch.maximum keep NaN.  So a norm,
# a largest loss or a flag that is combined by MAX says that all is well when it is not.
#
# llamax looks for NaN in sums: llamax/optim/clip.py; the one maximum of a step is that of logits,
# whose exponentials are then summed over the ranks: llamax/parallel/cross_entropy.py.
set -euo pipefail

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
cat > "$scratch/maximum.py" <<'PYTHON'
import math, sys
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def rank_main(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=4)
    mine = [0.0, math.nan, 2.0, 3.0][rank]
    eight, one = torch.full((8,), mine), torch.full((1,), mine)
    dist.all_reduce(eight, dist.ReduceOp.MAX)
    dist.all_reduce(one, dist.ReduceOp.MAX)
    if rank == 0:
        print("eight", *eight.tolist())
        print("one", *one.tolist())
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch.max", torch.tensor([0.0, math.nan, 2.0, 3.0]).max().item(), flush=True)
    mp.spawn(rank_main, (sys.argv[1],), nprocs=4)
PYTHON
"$scratch/venv/bin/python" "$scratch/maximum.py" "$scratch/store" 2> "$scratch/log" > "$scratch/seen" ||
  { cat "$scratch/log"; exit 1; }
echo "the largest of 0, NaN, 2, 3 on four ranks:"
cat "$scratch/seen"
cat > "$scratch/expected" <<'SEEN'
torch.max nan
eight 0.0 0.0 nan nan 3.0 3.0 3.0 3.0
one 0.0
SEEN
if cmp -s "$scratch/seen" "$scratch/expected"; then
  echo "as described above"
else
  echo "CHANGED: describe what is seen now"
  exit 1
fi
