#!/usr/bin/env bash
# torch-xla splits wrongly where functionalization is off, as torch-neuronx has it.
#
# Seen with torch-xla 2.9.0 and torch 2.9.0, on the CPU client.
#
# With XLA_DISABLE_FUNCTIONALIZATION=1 split() into parts of several sizes along another dim than the
# first takes the parts' elements one after the other, whatever their row: of rows 0 1 2 3 and 4 5 6 7
# the part of three columns is 0 1 2, 3 4 5.  No error is raised.  Equal parts, parts of the first dim
# and tensor_split are right.  torch-xla's issue 8640 has it for matrices; it is so for every number
# of dims, forward and backward.  AWS's documentation says that torch-neuronx sets this variable to 1.
# So a fused q, k, v projection with fewer key heads than query heads is trained on mixed rows on
# Trainium: a small Llama had 2.5 times the gradient norm, and a loss that falls all the same.
#
# llamax sets the variable to 0 before torch-xla is imported (llamax/backends/xla_install.py), and its
# model takes tensor_split, so that programs of one's own with other settings train on right rows too.
set -euo pipefail

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.9.0 torch-xla==2.9.0
cat > "$scratch/split.py" <<'PYTHON'
import torch
import torch_xla

x = torch.arange(8.0).reshape(2, 4)
ways = {
    "split (3, 1), dim 1": lambda x: x.split((3, 1), dim=1),
    "split (3, 1), dim 2 of 3": lambda x: x[None].split((3, 1), dim=2),
    "split (1, 1), dim 0": lambda x: x.split((1, 1), dim=0),
    "chunk 2, dim 1": lambda x: x.chunk(2, dim=1),
    "tensor_split at 3, dim 1": lambda x: x.tensor_split((3,), dim=1),
}
for name, way in ways.items():
    expected, found = way(x)[0], way(x.to(torch_xla.device()))[0].cpu()
    print(f"{name}: {found.flatten().tolist()}", "" if found.equal(expected) else "WRONG")
PYTHON
for off in 0 1; do
  echo "XLA_DISABLE_FUNCTIONALIZATION=$off"
  PJRT_DEVICE=CPU XLA_DISABLE_FUNCTIONALIZATION=$off "$scratch/venv/bin/python" \
    "$scratch/split.py" 2> "$scratch/log" || { cat "$scratch/log"; exit 1; }
done | sed 's/ $//' > "$scratch/seen"
cat "$scratch/seen"
cat > "$scratch/expected" <<'SEEN'
XLA_DISABLE_FUNCTIONALIZATION=0
split (3, 1), dim 1: [0.0, 1.0, 2.0, 4.0, 5.0, 6.0]
split (3, 1), dim 2 of 3: [0.0, 1.0, 2.0, 4.0, 5.0, 6.0]
split (1, 1), dim 0: [0.0, 1.0, 2.0, 3.0]
chunk 2, dim 1: [0.0, 1.0, 4.0, 5.0]
tensor_split at 3, dim 1: [0.0, 1.0, 2.0, 4.0, 5.0, 6.0]
XLA_DISABLE_FUNCTIONALIZATION=1
split (3, 1), dim 1: [0.0, 1.0, 2.0, 3.0, 4.0, 5.0] WRONG
split (3, 1), dim 2 of 3: [0.0, 1.0, 2.0, 3.0, 4.0, 5.0] WRONG
split (1, 1), dim 0: [0.0, 1.0, 2.0, 3.0]
chunk 2, dim 1: [0.0, 1.0, 4.0, 5.0]
tensor_split at 3, dim 1: [0.0, 1.0, 2.0, 4.0, 5.0, 6.0]
SEEN
if cmp -s "$scratch/seen" "$scratch/expected"; then
  echo "as described above"
else
  echo "CHANGED: describe what is seen now"
  exit 1
fi
