"""A config.json written by transformers 5 loses its rotary base in transformers 4, silently.

Seen with transformers 5.23.0 (writer) and 4.57.1 (reader), without torch.

transformers 5 keeps the rotary settings of a Llama in one table, ``rope_parameters``, and writes
nothing else.  transformers 4 reads ``rope_theta`` and ``rope_scaling`` and does not know the table:
it keeps it as an unknown attribute, takes the default base 10,000, and prints nothing.  A Llama 3.1
(base 500,000, scaled frequencies) then computes wrong positions.

llamax writes both spellings, see ``llamax/config/model.py``.

    python findings/transformers_rope_parameters.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

WRITER, READER = "transformers==5.23.0", "transformers==4.57.1"
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
WRITE = f"""
import sys, transformers
transformers.LlamaConfig(rope_parameters={ROPE!r}).save_pretrained(sys.argv[1])
"""
READ = """
import json, sys, transformers
config = transformers.LlamaConfig.from_pretrained(sys.argv[1])
print(json.dumps({"rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling}))
"""


def environment(folder: Path, package: str) -> Path:
    """The Python of a new environment with one pinned package."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package]
    subprocess.run(command, check=True)
    return python


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = folder / "model"
        writer = environment(folder / "writer", WRITER)
        reader = environment(folder / "reader", READER)
        subprocess.run([writer, "-c", WRITE, model], check=True, capture_output=True)
        written = json.loads((model / "config.json").read_text())
        done = subprocess.run(
            [reader, "-c", READ, model], check=True, capture_output=True, text=True
        )
        found = json.loads(done.stdout)
    ours = {key: written[key] for key in sorted(written) if key.startswith("rope")}
    print(f"{WRITER} writes  {ours}")
    print(f"{READER} reads   {found}")
    about_rope = [line for line in done.stderr.splitlines() if "rope" in line]
    print(f"{READER} says    {about_rope or 'nothing about it'}")
    same = (
        set(ours) == {"rope_parameters"}
        and ours["rope_parameters"]["rope_theta"] == 500000.0
        and found == {"rope_theta": 10000.0, "rope_scaling": None}
        and not about_rope
    )
    print("as described above" if same else "CHANGED: describe what is seen now")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
