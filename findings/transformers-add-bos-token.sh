#!/usr/bin/env bash
# transformers 5 ignores add_bos_token beside a tokenizer.json: texts gain or lose their first token.
#
# Seen with transformers 5.23.0 and 4.57.1, without torch.
#
# The tokenizer_config.json of a Llama says by add_bos_token whether a text begins with BOS.
# transformers 4 does what it says: it rewrites the template of the tokenizer.json that it loads.
# transformers 5 loads the same class from the same folder and uses the template as it lies in
# tokenizer.json, whatever add_bos_token is, and prints nothing.  So the two give the texts of a
# folder where the files disagree other ids, and a model that never saw a text without BOS gets one.
#
# llamax takes the template, as transformers 5 does, and warns where the two disagree:
# llamax/data/tokenizer/hf_tokenizer.py.
set -euo pipefail

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for version in 4.57.1 5.23.0; do
  python3 -m venv "$scratch/$version"
  "$scratch/$version/bin/python" -m pip install --quiet --disable-pip-version-check transformers==$version
done
"$scratch/4.57.1/bin/python" - "$scratch" 2> /dev/null <<'PYTHON'
import json, pathlib, sys
from tokenizers import Tokenizer, models, pre_tokenizers, processors
for name, template, setting in (("without", None, True), ("with", "<s> $A", False)):
    words = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "\u2581a"]  # in the form of Llama 2's
    engine = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [("\u2581", "a")], unk_token="<unk>")
    )
    engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    engine.add_special_tokens(["<unk>", "<s>", "</s>"])
    if template:
        engine.post_processor = processors.TemplateProcessing(template, special_tokens=[("<s>", 1)])
    folder = pathlib.Path(sys.argv[1]) / name
    folder.mkdir()
    engine.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": setting, "legacy": False}
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | special))
PYTHON
cat > "$scratch/ids.py" <<'PYTHON'
import json, sys
import transformers
for name in ("without", "with"):
    folder = f"{sys.argv[1]}/{name}"
    setting = json.load(open(f"{folder}/tokenizer_config.json"))["add_bos_token"]
    ids = transformers.AutoTokenizer.from_pretrained(folder)("a")["input_ids"]
    print(f"{transformers.__version__}: template {name} <s>, add_bos_token {setting}: {ids}")
PYTHON
for version in 4.57.1 5.23.0; do
  "$scratch/$version/bin/python" "$scratch/ids.py" "$scratch" 2> "$scratch/log" > "$scratch/seen" ||
    { cat "$scratch/log"; exit 1; }
  tee -a "$scratch/all" < "$scratch/seen"
  echo "$version: messages about it: $(grep -ci bos "$scratch/log" || true)" | tee -a "$scratch/all"
done
cat > "$scratch/expected" <<'SEEN'
4.57.1: template without <s>, add_bos_token True: [1, 6]
4.57.1: template with <s>, add_bos_token False: [6]
4.57.1: messages about it: 0
5.23.0: template without <s>, add_bos_token True: [6]
5.23.0: template with <s>, add_bos_token False: [1, 6]
5.23.0: messages about it: 0
SEEN
if cmp -s "$scratch/all" "$scratch/expected"; then
  echo "as described above"
else
  echo "CHANGED: describe what is seen now"
  exit 1
fi
