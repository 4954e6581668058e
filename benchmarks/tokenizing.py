"""``llamax prepare`` against an older build of it, and against the engines' own Python interfaces.

    python benchmarks/tokenizing.py TOKENIZER [--old FOLDER] [--paths FOLDER_OR_FILE ...]

TOKENIZER is a tokenizer.model, tokenizer.json or tiktoken file.  Every contender is a program of
its own that takes the same documents (by default the standard library's sources) from a JSONL file
to their ids; ``prepare`` writes the whole dataset, with two processes.  FOLDER holds the sources of
an older build.  Rounds are interleaved, A B A B; medians of processor seconds are reported, of all
processes together, because the machine may be busy.  Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from llamax.data.dataset import open_dataset
from llamax.data.tokenizer.tokenizer import load_tokenizer

# Programs with the arguments ROWS TOKENIZER: ids of all documents by an engine's own interface.
READ = "import json, sys; texts = [json.loads(line)['text'] for line in open(sys.argv[1])]\n"
PEERS = {
    "sentencepiece": READ + "import sentencepiece\n"
    "sentencepiece.SentencePieceProcessor(sys.argv[2]).encode(texts, num_threads=2)",
    "tokenizers": READ + "import tokenizers\n"
    "engine = tokenizers.Tokenizer.from_file(sys.argv[2])\n"
    "[each.ids for each in engine.encode_batch_fast(texts, add_special_tokens=False)]",
    "gigatoken": READ + "import gigatoken\n"
    "make = gigatoken.Tokenizer\n"
    "if sys.argv[2].endswith('.tiktoken'):\n"
    "    engine = make.from_tiktoken(sys.argv[2], 'olmo3')\n"
    "else:\n"
    "    make = make if sys.argv[2].endswith('.json') else make.from_sentencepiece\n"
    "    engine = make(sys.argv[2])\n"
    "engine.encode_batch_list(texts)",
}


def documents(paths: list[Path], megabytes: float) -> list[str]:
    """Documents up to a size: UTF-8 text files as they are, spread over all that there are."""
    texts = []
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            skip = {"site-packages", "__pycache__"} & set(file.parts)
            if file.suffix in (".py", ".txt", ".md", ".rst", ".csv", ".jsonl") and not skip:
                try:
                    texts.append(file.read_text(encoding="utf-8"))
                except UnicodeDecodeError:
                    continue
    total = sum(map(len, texts)) / 1e6
    return [text for text in texts[:: max(1, round(total / megabytes))] if text]


def processor_seconds(command: list[str], folder: Path) -> float:
    """Processor seconds of a program and its children, started in ``folder``."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tokenizer", type=Path, help="tokenizer.model, tokenizer.json or .tiktoken")
    parser.add_argument("--old", type=Path, help="sources of an older build")
    parser.add_argument("--paths", nargs="+", type=Path, help="documents, or folders of them")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--megabytes", type=float, default=40)
    args = parser.parse_args()
    texts = documents(args.paths or [Path(sysconfig.get_paths()["stdlib"])], args.megabytes)
    size = sum(len(text.encode()) for text in texts) / 1e6
    kind = {".json": "tokenizers", ".tiktoken": ""}.get(args.tokenizer.suffix, "sentencepiece")
    here = Path(__file__).resolve().parents[1]
    path = str(args.tokenizer.resolve())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows, out = folder / "rows.jsonl", folder / "out"
        rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        words = ["-m", "llamax", "prepare", str(rows), "--tokenizer", path, "--workers", "2"]
        whole = [sys.executable, *words, "--validation", "0", "--out", str(out)]
        contenders = {"llamax prepare": (whole, here)}
        if args.old:
            contenders["llamax prepare, the older build"] = (whole, args.old)
        for name, program in PEERS.items():
            if name in (kind, "gigatoken") and find_spec(name):
                command = [sys.executable, "-c", program, str(rows), path]
                contenders[f"{name} alone"] = (command, folder)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(args.rounds):
            for name, (command, place) in contenders.items():
                shutil.rmtree(out, ignore_errors=True)
                times[name].append(processor_seconds(command, place))
        shutil.rmtree(out, ignore_errors=True)
        processor_seconds(whole, here)
        equal = same_ids(out, texts, args.tokenizer)
    names = ("gigatoken", "sentencepiece", "tokenizers", "tiktoken", "numpy")
    print(f"{len(texts)} documents, {size:.1f} MB; {equal} have the ids of the reference")
    print(f"Python {platform.python_version()}, " + ", ".join(f"{n} {version(n)}" for n in names))
    print("\n| contender | CPU s | MB per CPU s | llamax is |\n|---|---|---|---|")
    ours = statistics.median(times["llamax prepare"])
    for name, taken in times.items():
        median = statistics.median(taken)
        print(f"| {name} | {median:.2f} | {size / median:.1f} | {median / ours:.2f} times |")


def same_ids(out: Path, texts: list[str], tokenizer: Path) -> int:
    """The number of documents of a dataset that have the ids of the reference engine."""
    data, judge = open_dataset(out).train, load_tokenizer(tokenizer)
    ends = data.documents[1:].astype(np.int64)
    parts = np.split(np.asarray(data.tokens), ends[:-1])
    ends_with = [] if data.header.eos_id is None else [data.header.eos_id]
    begins_with = [] if data.header.bos_id is None else [data.header.bos_id]
    return sum(
        part.tolist() == [*begins_with, *judge.encode(text), *ends_with]
        for part, text in zip(parts, texts, strict=True)
    )


if __name__ == "__main__":
    main()
