#!/usr/bin/env bash
# xm.all_gather of torch-xla is no all-gather by default, and is another program on each rank.
#
# Seen with torch-xla 2.9.0 and torch 2.9.0, on two devices of the CPU client; nothing is executed.
#
# With its default pin_layout=True, xm.all_gather pads the tensor with zeros to the size of the result
# and sums it over the ranks.  So each rank sends and adds the whole result rather than its share, and
# the padding, a constant that depends on the rank, makes every rank's program another one: no rank
# finds what another has compiled.  On Trainium one compilation of a step takes minutes to hours.
# pin_layout=False gives the all-gather of XLA, the same program on all ranks.
#
# llamax gives pin_layout=False in all-gather, reduce-scatter and all-to-all: llamax/backends/xla.py.
set -euo pipefail

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.9.0 torch-xla==2.9.0
cat > "$scratch/gather.py" <<'PYTHON'
import pathlib, re, sys
import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.distributed.xla_multiprocessing as xmp
import torch_xla.runtime as runtime


def rank_main(index: int, folder: str, pinned: bool) -> None:
    x = torch.ones(2, 3).to(torch_xla.device())
    program = torch_xla._XLAC._get_xla_tensors_hlo([xm.all_gather(x, 0, pin_layout=pinned)])
    words = " ".join(re.findall(r"(?:all-\w+|pad)(?=\()|padding=\w+", program))
    rank = runtime.global_ordinal()
    pathlib.Path(folder, f"{pinned} {rank}").write_text(f"pin_layout={pinned}, rank {rank}: {words}")


if __name__ == "__main__":
    for pinned in (False, True):
        xmp.spawn(rank_main, args=(sys.argv[1], pinned))
    print("\n".join(path.read_text() for path in sorted(pathlib.Path(sys.argv[1]).iterdir())))
PYTHON
mkdir "$scratch/programs"
PJRT_DEVICE=CPU CPU_NUM_DEVICES=2 "$scratch/venv/bin/python" "$scratch/gather.py" "$scratch/programs" \
  2> "$scratch/log" > "$scratch/seen" || { cat "$scratch/log"; exit 1; }
cat "$scratch/seen"
cat > "$scratch/expected" <<'SEEN'
pin_layout=False, rank 0: all-gather
pin_layout=False, rank 1: all-gather
pin_layout=True, rank 0: pad padding=0_2x0_0 all-reduce
pin_layout=True, rank 1: pad padding=2_0x0_0 all-reduce
SEEN
if cmp -s "$scratch/seen" "$scratch/expected"; then
  echo "as described above"
else
  echo "CHANGED: describe what is seen now"
  exit 1
fi
