#!/usr/bin/env bash
# A config.json written by transformers 5 loses its rotary base in transformers 4, silently.
#
# Seen with transformers 5.23.0 (writer) and 4.57.1 (reader), without torch.
#
# transformers 5 keeps the rotary settings of a Llama in one table, rope_parameters, and writes
# nothing else.  transformers 4 reads rope_theta and rope_scaling and does not know the table: it
# keeps the table as an unknown attribute, takes the default base 10,000, and prints nothing.  A
# Llama 3.1 (base 500,000, scaled frequencies) then computes wrong positions.
#
# llamax writes both spellings: llamax/config/model.py.
set -euo pipefail

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
install() { # FOLDER PACKAGE: an environment with one pinned package
  python3 -m venv "$scratch/$1"
  "$scratch/$1/bin/python" -m pip install --quiet --disable-pip-version-check "$2"
}
install writer transformers==5.23.0
install reader transformers==4.57.1

"$scratch/writer/bin/python" - "$scratch/model" > /dev/null 2>&1 <<'PYTHON'
import sys, transformers
rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
transformers.LlamaConfig(rope_parameters=rope).save_pretrained(sys.argv[1])
PYTHON
"$scratch/reader/bin/python" - "$scratch/model" > "$scratch/read" 2> "$scratch/words" <<'PYTHON'
import sys, transformers
config = transformers.LlamaConfig.from_pretrained(sys.argv[1])
print(f"rope_theta {config.rope_theta}, rope_scaling {config.rope_scaling}")
PYTHON

echo "transformers 5.23.0 writes: $(grep -o '"rope[a-z_]*"' "$scratch/model/config.json" | tr '\n' ' ')"
echo "transformers 4.57.1 reads:  $(cat "$scratch/read")"
echo "transformers 4.57.1 says of it: $(grep -i rope "$scratch/words" || echo nothing)"
if grep -q '"rope_theta": 500000.0' "$scratch/model/config.json" &&
  ! grep -q '"rope_scaling"' "$scratch/model/config.json" &&
  [ "$(cat "$scratch/read")" = "rope_theta 10000.0, rope_scaling None" ] &&
  ! grep -qi rope "$scratch/words"; then
  echo "as described above"
else
  echo "CHANGED: describe what is seen now"
  exit 1
fi
