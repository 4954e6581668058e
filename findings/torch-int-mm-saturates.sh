#!/usr/bin/env bash
# The int8 product of torch adds in 16 bits on processors without VNNI, and saturates: no error.
#
# Seen with torch 2.13.0 on x86-64.
#
# torch._int_mm multiplies int8 matrices into int32; weight-only and dynamic int8 quantisers build on
# it.  Without VNNI its kernel adds neighbouring products in 16 bits before it widens them, and a
# pair that does not fit is cut to the nearest number that does.  Codes of real weights are large
# enough for that.  ONEDNN_MAX_CPU_ISA, a documented setting of oneDNN, shows both on one processor
# that has VNNI; on one without it, both lines are wrong.
#
# llamax takes this product only where the processor has VNNI or AMX: llamax/model/int8.py.
set -euo pipefail

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
cat > "$scratch/product.py" <<'PYTHON'
import torch
a = torch.full((32, 64), 100, dtype=torch.int8)
found = torch._int_mm(a, a.T.contiguous())[0, 0].item()
print(found, "of", 64 * 100 * 100)
PYTHON
for isa in AVX2 DEFAULT; do
  seen=$(ONEDNN_MAX_CPU_ISA=$isa "$scratch/venv/bin/python" "$scratch/product.py" 2> "$scratch/log") ||
    { cat "$scratch/log"; exit 1; }
  echo "ONEDNN_MAX_CPU_ISA=$isa: $seen"
  echo "$seen" >> "$scratch/all"
done
vnni=$(grep -cE 'avx512_vnni|avx_vnni' /proc/cpuinfo || true)
if [ "$(head -1 "$scratch/all")" != "640000 of 640000" ] &&
  { [ "$vnni" = 0 ] || [ "$(tail -1 "$scratch/all")" = "640000 of 640000" ]; }; then
  echo "as described above"
else
  echo "CHANGED: describe what is seen now"
  exit 1
fi
