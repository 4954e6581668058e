#!/usr/bin/env bash
# One folder is two models: transformers 5 keeps a head that config.json ties, transformers 4 drops it.
#
# Seen with transformers 5.23.0 and 4.57.1, torch 2.13.0.
#
# Where config.json says tie_word_embeddings = true and the files hold an lm_head.weight with other
# values than the embedding, transformers 4 computes the logits with the embedding, prints nothing,
# and lists no key as unexpected.  transformers 5 computes them with the stored head, and warns.
# Trainers that untie the two while config.json goes on saying that they are tied write such folders:
# the same files then have another loss in each version.
#
# llamax keeps the head as transformers 5 does, and warns: llamax/checkpoint/hf_folder.py.
set -euo pipefail

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for version in 4.57.1 5.23.0; do
  python3 -m venv "$scratch/$version"
  "$scratch/$version/bin/python" -m pip install --quiet --disable-pip-version-check \
    transformers==$version torch==2.13.0
done
"$scratch/4.57.1/bin/python" - "$scratch/model" > /dev/null 2>&1 <<'PYTHON'
import json, pathlib, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
folder = pathlib.Path(sys.argv[1])
torch.manual_seed(0)
sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False)).save_pretrained(folder)
config = json.loads((folder / "config.json").read_text())
(folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
PYTHON
cat > "$scratch/read.py" <<'PYTHON'
import sys
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
model, found = LlamaForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
stored = load_file(f"{sys.argv[1]}/model.safetensors")
for name in ("lm_head.weight", "model.embed_tokens.weight"):
    if torch.equal(model.lm_head.weight, stored[name]):
        print(f"the head is {name}; unexpected keys: {len(found['unexpected_keys'])}")
PYTHON
for version in 4.57.1 5.23.0; do
  seen=$("$scratch/$version/bin/python" "$scratch/read.py" "$scratch/model" 2> "$scratch/log") ||
    { cat "$scratch/log"; exit 1; }
  messages=$(grep -ciE 'tied|tie_word' "$scratch/log" || true)
  echo "transformers $version: $seen; messages about it: $messages" | tee -a "$scratch/all"
done
cat > "$scratch/expected" <<'SEEN'
transformers 4.57.1: the head is model.embed_tokens.weight; unexpected keys: 0; messages about it: 0
transformers 5.23.0: the head is lm_head.weight; unexpected keys: 0; messages about it: 1
SEEN
if cmp -s "$scratch/all" "$scratch/expected"; then
  echo "as described above"
else
  echo "CHANGED: describe what is seen now"
  exit 1
fi
