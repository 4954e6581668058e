#!/usr/bin/env bash
# The last step of a linear schedule compiles a second program on torch-xla: its rate is exactly 0.
#
# Seen with torch-xla 2.9.0 and torch 2.9.0, on the CPU client; counted by torch-xla's own metrics.
#
# torch-xla sends most Python numbers to the device as inputs of the program, so a learning rate may
# change in every step.  The numbers 0, 1 and -1 it writes into the program as constants.  So a
# schedule that ends at 0, or that passes 1, asks for another program there.  On Trainium a training
# step takes minutes to hours to compile: all nodes wait in the last step, or, with a compilation
# done beforehand, the job stops because that program is missing.  XLA_NO_SPECIAL_SCALARS=1 turns
# this off.
#
# llamax sends the rate and the number of the step as tensors: llamax/training/step.py.
set -euo pipefail

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.9.0 torch-xla==2.9.0
cat > "$scratch/steps.py" <<'PYTHON'
import torch
import torch_xla
from torch_xla.debug.metrics import metric_data


def compiled() -> int:
    return (metric_data("CompileTime") or (0,))[0]


device = torch_xla.device()
weight = torch.nn.Parameter(torch.ones(4).to(device))
x = torch.ones(4).to(device)
optimizer = torch.optim.SGD([weight], lr=0.5)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=5)
for step in range(6):
    before, rate = compiled(), schedule.get_last_lr()[0]
    (weight * x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    torch_xla.sync()
    print(f"step {step} rate {rate:.1f} programs compiled {compiled() - before}")
    schedule.step()
PYTHON
PJRT_DEVICE=CPU "$scratch/venv/bin/python" "$scratch/steps.py" 2> "$scratch/log" > "$scratch/seen" ||
  { cat "$scratch/log"; exit 1; }
cat "$scratch/seen"
cat > "$scratch/expected" <<'SEEN'
step 0 rate 0.5 programs compiled 1
step 1 rate 0.4 programs compiled 0
step 2 rate 0.3 programs compiled 0
step 3 rate 0.2 programs compiled 0
step 4 rate 0.1 programs compiled 0
step 5 rate 0.0 programs compiled 1
SEEN
if cmp -s "$scratch/seen" "$scratch/expected"; then
  echo "as described above"
else
  echo "CHANGED: describe what is seen now"
  exit 1
fi
