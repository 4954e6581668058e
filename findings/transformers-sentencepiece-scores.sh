#!/usr/bin/env bash
# transformers 5 merges the pieces of a tokenizer.model by their numbers instead of their scores.
#
# Seen with transformers 5.23.0 and the first Mistral tokenizer.model of mistral-common 1.8.6; sentencepiece
# 0.2.1 and transformers 4.57.1, slow and fast, are the judges.
#
# In this vocabulary, as in Llama 2's, runs of spaces have small numbers and the lowest scores, so
# sentencepiece makes them last.  transformers 5 builds its tokenizer from the file without the
# scores: two spaces before a word become one piece, and the word is made without a space.  No message
# says so.  A folder whose only tokenizer is tokenizer.model is read like this.
#
# llamax encodes with sentencepiece, and exports a tokenizer.json in the order of the scores, which
# transformers 5 reads instead: llamax/data/tokenizer/hf_export.py.
set -euo pipefail

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for version in 4.57.1 5.23.0; do
  python3 -m venv "$scratch/$version"
  "$scratch/$version/bin/python" -m pip install --quiet --disable-pip-version-check \
    transformers==$version sentencepiece==0.2.1 protobuf==6.33.0
done
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
  --dest "$scratch" mistral-common==1.8.6
mkdir "$scratch/model"
python3 - "$scratch" <<'PYTHON'
import json, pathlib, sys, zipfile
scratch = pathlib.Path(sys.argv[1])
(wheel,) = scratch.glob("mistral_common-*.whl")
raw = zipfile.ZipFile(wheel).read("mistral_common/data/tokenizer.model.v1")
(scratch / "model/tokenizer.model").write_bytes(raw)
settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
(scratch / "model/tokenizer_config.json").write_text(json.dumps({**settings, "legacy": False}))
PYTHON
cat > "$scratch/pieces.py" <<'PYTHON'
import sys
import sentencepiece, transformers
folder = sys.argv[1]
judge = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/tokenizer.model")
makers = {"sentencepiece": lambda text: judge.encode(text, out_type=str)}
for name in ("slow", "fast") if transformers.__version__ < "5" else ("only",):
    choice = {} if name == "only" else {"use_fast": name == "fast"}
    makers[name] = transformers.AutoTokenizer.from_pretrained(folder, **choice).tokenize
for name, pieces in makers.items():
    print(name, ascii(" ".join(pieces("fibre.  How"))))
PYTHON
for version in 4.57.1 5.23.0; do
  "$scratch/$version/bin/python" "$scratch/pieces.py" "$scratch/model" 2> "$scratch/log" > "$scratch/seen" ||
    { cat "$scratch/log"; exit 1; }
  echo "transformers $version:"
  cat "$scratch/seen"
  cat "$scratch/seen" >> "$scratch/all"
done
cat > "$scratch/expected" <<'SEEN'
sentencepiece '\u2581fib re . \u2581 \u2581How'
slow '\u2581fib re . \u2581 \u2581How'
fast '\u2581fib re . \u2581 \u2581How'
sentencepiece '\u2581fib re . \u2581 \u2581How'
only '\u2581fib re . \u2581\u2581 How'
SEEN
if cmp -s "$scratch/all" "$scratch/expected"; then
  echo "as described above"
else
  echo "CHANGED: describe what is seen now"
  exit 1
fi
