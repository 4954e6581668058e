#!/usr/bin/env bash
# The compiled CPU quantiser of bitsandbytes makes 0 another number.
#
# Seen with bitsandbytes 0.50.2 and torch 2.13.0; it takes the torch of $PYTHON, by default python3.
#
# quantize_blockwise divides a block by its largest magnitude and keeps the nearest of 256 values.  Its
# portable and CUDA kernels compare with the middles between the values.  The compiled CPU kernel looks
# up a table with steps of 2^-15 instead: 0 and whatever is that small become 2.1e-5 of the largest
# magnitude, although the map has a 0.  So AdamW8bit on a CPU moves weights without a gradient.
#
# llamax compares with the middles: llamax/optim/blockwise.py.
set -euo pipefail

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python=${PYTHON:-python3}
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$scratch/site" \
  bitsandbytes==0.50.2
cat > "$scratch/zero.py" <<'PYTHON'
import bitsandbytes.functional as F
import torch
block = torch.zeros(256)
block[0] = 1.0
codes, state = F.quantize_blockwise(block, blocksize=256)
print(f"{float(F.dequantize_blockwise(codes, state)[1]):.2e}")
PYTHON
seen=$(PYTHONPATH="$scratch/site" "$python" "$scratch/zero.py" 2>/dev/null)
echo "0 beside 1 becomes $seen"
if [ "$seen" = "2.12e-05" ]; then
  echo "as described above"
else
  echo "CHANGED: describe what is seen now"
  exit 1
fi
