#!/usr/bin/env bash
# torch-xla loses NaN in max, min and clamp(max=...): a gradient with NaN has the norm 3.
#
# Seen with torch-xla 2.9.0 and torch 2.9.0, on the CPU client.
#
# torch keeps NaN in all of these.  torch-xla's max and min skip it, and clamp(max=1) makes it the
# lowest float32, -3.4e38, while clamp(-1, 1), maximum and minimum keep it.  The clip_grad_norm_ that
# torch-xla puts in the place of torch's looks for NaN in such a maximum: with norm_type=inf it returns
# 3.0 for a gradient of 1, NaN, 3, and error_if_nonfinite=True raises nothing.  A clipping factor that
# is cut by clamp(max=1) becomes finite and negative.  So the usual checks let NaN into the weights.
#
# llamax decides by x - x == 0 on a sum, which keeps NaN: llamax/optim/clip.py.
set -euo pipefail

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.9.0 torch-xla==2.9.0
cat > "$scratch/nan.py" <<'PYTHON'
import math
import torch
import torch_xla

computed = {
    "max": lambda x: x.max(),
    "min": lambda x: x.min(),
    "norm inf": lambda x: torch.linalg.vector_norm(x, math.inf),
    "norm 2": lambda x: torch.linalg.vector_norm(x),
    "clamp(max=1)": lambda x: x.clamp(max=1),
    "clamp(-1, 1)": lambda x: x.clamp(-1, 1),
    "x - x == 0": lambda x: (x - x) == 0,
}
for name, function in computed.items():
    found = []
    for device in ("cpu", torch_xla.device()):
        x = torch.tensor([1.0, math.nan, 3.0]).to(device)
        found.append(function(x).cpu().tolist())
    print(f"{name}: torch {found[0]}, torch-xla {found[1]}")
weight = torch.nn.Parameter(torch.zeros(3).to(torch_xla.device()))
weight.grad = torch.tensor([1.0, math.nan, 3.0]).to(torch_xla.device())
norm = torch.nn.utils.clip_grad_norm_([weight], 1.0, norm_type=math.inf, error_if_nonfinite=True)
print(f"clip_grad_norm_ of torch-xla: norm {norm.item()}, no error")
PYTHON
PJRT_DEVICE=CPU "$scratch/venv/bin/python" "$scratch/nan.py" 2> "$scratch/log" > "$scratch/seen" ||
  { cat "$scratch/log"; exit 1; }
echo "of 1, NaN, 3:"
cat "$scratch/seen"
cat > "$scratch/expected" <<'SEEN'
max: torch nan, torch-xla 3.0
min: torch nan, torch-xla 1.0
norm inf: torch nan, torch-xla 3.0
norm 2: torch nan, torch-xla nan
clamp(max=1): torch [1.0, nan, 1.0], torch-xla [1.0, -3.4028234663852886e+38, 1.0]
clamp(-1, 1): torch [1.0, nan, 1.0], torch-xla [1.0, nan, 1.0]
x - x == 0: torch [True, False, True], torch-xla [True, False, True]
clip_grad_norm_ of torch-xla: norm 3.0, no error
SEEN
if cmp -s "$scratch/seen" "$scratch/expected"; then
  echo "as described above"
else
  echo "CHANGED: describe what is seen now"
  exit 1
fi
