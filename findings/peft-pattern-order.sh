#!/usr/bin/env bash
# An adapter of PEFT with overlapping patterns computes something else after save and load.
#
# Seen with peft 0.21.2, transformers 5.23.0 and torch 2.13.0.
#
# rank_pattern and alpha_pattern give some modules other ranks and alphas; of several patterns that
# match a module, the first counts.  save_pretrained sorts the keys of adapter_config.json by their
# letters, those of the patterns too: "k_proj" comes before "layers.0.self_attn.k_proj".  So an
# exception that was written first and was trained is never reached again after loading, and the
# alpha of all other layers takes its place.  No message says so.  With other ranks, loading fails.
#
# llamax reads the file as PEFT does and warns where patterns give a module two values:
# llamax/checkpoint/peft_settings.py.
set -euo pipefail

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  peft==0.21.2 transformers==5.23.0 torch==2.13.0
cat > "$scratch/patterns.py" <<'PYTHON'
import copy, json, pathlib, sys
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

folder = pathlib.Path(sys.argv[1])
torch.manual_seed(0)
base = LlamaForCausalLM(
    LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=2)
)
adapters = LoraConfig(
    r=2,
    target_modules=["k_proj"],
    alpha_pattern={"layers.0.self_attn.k_proj": 64, "k_proj": 8},
    init_lora_weights=False,  # at random, as if trained
)
trained = get_peft_model(copy.deepcopy(base), adapters)
trained.save_pretrained(folder)
loaded = PeftModel.from_pretrained(base, folder)


def scales(model):
    return [layer.self_attn.k_proj.scaling["default"] for layer in model.get_base_model().model.layers]


ids = torch.tensor([[1, 2, 3]])
print("order of the keys in the file:", *json.loads((folder / "adapter_config.json").read_text())["alpha_pattern"])
print("scales of the two layers:", *scales(trained), "saved,", *scales(loaded), "loaded")
print("equal logits:", torch.equal(trained(ids).logits, loaded(ids).logits))
PYTHON
"$scratch/venv/bin/python" "$scratch/patterns.py" "$scratch/adapter" 2> "$scratch/log" > "$scratch/seen" ||
  { cat "$scratch/log"; exit 1; }
cat "$scratch/seen"
echo "messages about it: $(grep -iE 'alpha|pattern' "$scratch/log" || echo none)"
cat > "$scratch/expected" <<'SEEN'
order of the keys in the file: k_proj layers.0.self_attn.k_proj
scales of the two layers: 32.0 4.0 saved, 4.0 4.0 loaded
equal logits: False
SEEN
if cmp -s "$scratch/seen" "$scratch/expected" && ! grep -qiE 'alpha|pattern' "$scratch/log"; then
  echo "as described above"
else
  echo "CHANGED: describe what is seen now"
  exit 1
fi
