#!/usr/bin/env bash
# A bfloat16 sum of gloo gives equal elements different values: 256 and 260 in one tensor.
#
# Seen with torch 2.13.0, four ranks, backend gloo.
#
# all_reduce(SUM) rounds to bfloat16 after every addition, and the order of the ranks depends on the
# element's place in the tensor.  256 + 1 + 1 + 1 is 259, so 260 is the nearest bfloat16; added to
# 256 one by one, each 1 is lost.  So the loss of digits grows with the ranks, equal parameters with
# equal gradients move apart, and another size of the buckets of DistributedDataParallel, which
# moves gradients to other places, is another training.
#
# llamax's reduce-scatter, which gradients and sequence-parallel activations take, adds in float32 and
# in rank order, and rounds once: llamax/backends/torch_axes.py.
set -euo pipefail

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
cat > "$scratch/sum.py" <<'PYTHON'
import sys
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def rank_main(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=4)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.full((16,), [256.0, 1.0, 1.0, 1.0][rank], dtype=dtype)
        dist.all_reduce(x)
        if rank == 0:
            print(dtype, *map(int, x.tolist()))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(rank_main, (sys.argv[1],), nprocs=4)
PYTHON
"$scratch/venv/bin/python" "$scratch/sum.py" "$scratch/store" 2> "$scratch/log" > "$scratch/seen" ||
  { cat "$scratch/log"; exit 1; }
echo "256 + 1 + 1 + 1 of four ranks:"
cat "$scratch/seen"
cat > "$scratch/expected" <<'SEEN'
torch.float32 259 259 259 259 259 259 259 259 259 259 259 259 259 259 259 259
torch.bfloat16 260 260 260 260 256 256 256 256 256 256 256 256 260 260 260 260
SEEN
if cmp -s "$scratch/seen" "$scratch/expected"; then
  echo "as described above"
else
  echo "CHANGED: describe what is seen now"
  exit 1
fi
