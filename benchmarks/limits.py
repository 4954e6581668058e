"""Peak memory and time of commands on input that is far too large.

    python benchmarks/limits.py documents [--megabytes 200] [--tokenizer tokenizer.json]
    python benchmarks/limits.py layers [--layers 16384]

``documents``: ``llamax prepare`` with one worker on one document, which is read in pieces as plain
text, and is a single value in tables; in rows.jsonl it is an answer, for which there is a template.
``layers``: each command that reads ``config.json``, on one that states many layers and the weights
of one.  Each command is a program of its own; its peak is the resident memory of its largest
process.  ``cpu`` is processor time of all its processes.
"""

from __future__ import annotations

import argparse
import base64
import csv
import gzip
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file

from llamax.data.tokenizer.llama3 import LLAMA3_PATTERN
from llamax.data.tokenizer.train import train_sentencepiece

WORDS = "the river runs to the sea and "
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 300}
KINDS = ["tokenizer.model", "tokenizer.json", "ranks.tiktoken"]
COMMANDS = {
    "generate": ["generate", "FOLDER", "--prompt", "a"],
    "evaluate": ["evaluate", "FOLDER", "--data", "FOLDER"],
    "shard": ["shard", "FOLDER", "--out", "OUT"],
    "export": ["export", "FOLDER", "--to", "nxd", "--out", "OUT"],
    "import": ["import", "FOLDER", "--out", "OUT"],
    "merge": ["merge", "FOLDER", "ADAPTER", "--out", "OUT"],
    "inspect": ["inspect", "FOLDER"],
}


# A process that is started has the peak of the one that starts it: so this small one starts it.
MEASURE = """
import os, sys
pid = os.posix_spawn(sys.executable, [sys.executable, "-m", "llamax", *sys.argv[1:]], os.environ)
used = os.wait4(pid, 0)[2]
print("used", used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


def run(words: list[str]) -> tuple[float, float, str]:
    """Processor seconds, peak MB and the last line of ``llamax`` with these words."""
    command = [sys.executable, "-S", "-c", MEASURE, *words]
    done = subprocess.run(command, text=True, errors="replace", capture_output=True, check=True)
    *printed, used = done.stdout.strip().splitlines()
    lines = [*printed, *done.stderr.strip().splitlines()] or [""]
    said = [line for line in lines if line.startswith("llamax: ")] or lines
    _, seconds, peak = used.split()
    return float(seconds), int(peak) / 1000, said[-1]


def make_tokenizer(path: Path) -> None:
    """A small tokenizer of the kind that the name says."""
    lines = [f"{WORDS} {number} {number * 7919} x{number % 97}y" for number in range(2000)]
    if path.suffix == ".model":
        train_sentencepiece(lines, 300, path)
        return
    if path.suffix == ".tiktoken":
        tokens = [bytes([byte]) for byte in range(256)]
        tokens += [b" t", b"he", b" the", b"ri", b"ve", b"rive", b"river"]
        ranks = (base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))
        path.write_bytes(b"".join(ranks))
        return
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    byte = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN), "isolated")
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte])
    engine.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    engine.train_from_iterator(
        lines,
        tokenizers.trainers.BpeTrainer(
            vocab_size=330, show_progress=False, initial_alphabet=alphabet
        ),
    )
    engine.save(str(path))


def write_document(path: Path, size: int) -> None:
    """One document of ``size`` bytes as the kind of file that the name says."""
    text = WORDS * (size // len(WORDS))
    if path.suffix == ".gz":
        with gzip.open(path, "wt") as file:
            file.write(text)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["text"], [text]])
    elif path.name == "rows.jsonl":
        path.write_text(json.dumps({"instruction": "Where to?", "answer": text}) + "\n")
    elif path.suffix == ".jsonl":
        path.write_text(json.dumps({"text": text}) + "\n")
    elif path.suffix == ".parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist([{"text": text}]), path)
    elif path.suffix == ".npy":
        np.save(path, np.zeros(size // 2, np.uint16))
    else:
        path.write_text(text)


def documents(folder: Path, megabytes: float, only: str, kinds: list[str]) -> None:
    """The table of ``prepare``."""
    names = ["none.txt", "a.txt", "a.txt.gz", "a.jsonl", "a.csv", "a.npy", "rows.jsonl"]
    names += ["a.parquet"] if find_spec("pyarrow") else []
    names = [name for name in names if only in name]
    for kind in kinds:
        make_tokenizer(folder / kind)
    print(f"one document of {megabytes:g} MB, one worker, peak memory of the largest process\n")
    print("| file | on disk KB | tokenizer | --max-document | cpu s | peak MB | last line |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        path = folder / name
        write_document(path, int(megabytes * 1e6) if name != "none.txt" else 1000)
        for kind in kinds:
            for most in ("64MiB", f"{2 * megabytes:g}MB"):
                out = folder / f"{name}-{kind}-{most}"
                words = ["prepare", str(path), "--tokenizer", str(folder / kind), "--workers", "1"]
                words += ["--out", str(out), "--max-document", most]
                words += ["--template", "alpaca"] if name.startswith("rows") else []
                seconds, peak, said = run(words)
                said = said.replace(f"{folder}/", "")[:90]
                size = path.stat().st_size / 1000
                cells = [name, f"{size:.0f}", kind, most, f"{seconds:.1f}", f"{peak:.0f}", said]
                print(f"| {' | '.join(cells)} |", flush=True)
                shutil.rmtree(out, ignore_errors=True)
        path.unlink()


def layers(folder: Path, count: int, only: str) -> None:
    """The table of the commands that read config.json."""
    hub, adapter = folder / "hub", folder / "adapter"
    for place in (hub, adapter):
        place.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}
    config["tie_word_embeddings"] = True
    (hub / "config.json").write_text(json.dumps(config | {"num_hidden_layers": count}))
    home = "model.layers.0.self_attn.q_proj"
    weights = {f"{home}.weight": torch.zeros(64, 64)}
    weights["model.embed_tokens.weight"] = torch.zeros(SIZES["vocab_size"], SIZES["hidden_size"])
    save_file(weights, hub / "model.safetensors", {"format": "pt"})
    factors = {
        f"base_model.model.{home}.lora_A.weight": torch.zeros(2, 64),
        f"base_model.model.{home}.lora_B.weight": torch.zeros(64, 2),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    names = {"FOLDER": str(hub), "ADAPTER": str(adapter), "OUT": str(folder / "out")}
    print("| command | cpu s | peak MB | last line |\n|---|---|---|---|")
    for name, words in {"--version": ["--version"], **COMMANDS}.items():
        if only not in name:
            continue
        seconds, peak, said = run([names.get(word, word) for word in words])
        said = said.replace(f"{folder}/", "")[:90]
        print(f"| {name} | {seconds:.1f} | {peak:.0f} | {said} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("documents", "layers"))
    parser.add_argument("--megabytes", type=float, default=200.0, help="size of the document (200)")
    parser.add_argument("--layers", type=int, default=16384, help="layers in config.json (16384)")
    parser.add_argument("--only", default="", help="part of the names of files or commands")
    parser.add_argument(
        "--tokenizer", choices=KINDS, action="append", help="kind of tokenizer (tokenizer.model)"
    )
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        if options.what == "documents":
            kinds = options.tokenizer or KINDS[:1]
            documents(Path(folder), options.megabytes, options.only, kinds)
        else:
            layers(Path(folder), options.layers, options.only)


if __name__ == "__main__":
    main()
