#!/usr/bin/env bash
# Two versions of tokenizers give one text other ids with one tokenizer.json.
#
# Seen with tokenizers 0.20.0 and 0.23.3.
#
# The split patterns of Llama 3, Qwen and GPT-2 speak of letters and numbers (\p{L}, \p{N}).  Which
# characters these are is decided by the Unicode tables inside the package: those of 0.20.0 are older
# than Unicode 15, those of 0.23.3 newer.  So a text in a script that Unicode added meanwhile, such as
# Kawi, is split at other places, and has other ids.  Neither prints anything.
#
# llamax gives the ids of the installed reference engine: llamax/data/tokenizer/unicode_ages.py.
set -euo pipefail

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cat > "$scratch/split.py" <<'PYTHON'
from tokenizers import Regex, pre_tokenizers
letters = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"), "isolated")
parts = letters.pre_tokenize_str("a\U00011f04\U00011f51")  # Kawi: a letter and a digit
print(" ".join(ascii(part) for part, _ in parts))
PYTHON
for version in 0.20.0 0.23.3; do
  python3 -m venv "$scratch/$version"
  "$scratch/$version/bin/python" -m pip install --quiet --disable-pip-version-check tokenizers==$version
  "$scratch/$version/bin/python" "$scratch/split.py" > "$scratch/$version.txt"
  echo "tokenizers $version splits into: $(cat "$scratch/$version.txt")"
done
if [ "$(cat "$scratch/0.20.0.txt")" = "'a' '\\U00011f04\\U00011f51'" ] &&
  [ "$(cat "$scratch/0.23.3.txt")" = "'a\\U00011f04' '\\U00011f51'" ]; then
  echo "as described above"
else
  echo "CHANGED: describe what is seen now"
  exit 1
fi
