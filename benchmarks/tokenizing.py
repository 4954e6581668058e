"""``llamax prepare`` against an older build of it, and against the engines' own Python interfaces.

    python benchmarks/tokenizing.py TOKENIZER [--old FOLDER] [--paths FOLDER_OR_FILE ...]
    python benchmarks/tokenizing.py TOKENIZER [--old FOLDER] --rows ROWS.jsonl [--limit N]
    python benchmarks/tokenizing.py TOKENIZER --memory 10

TOKENIZER is a tokenizer.model, tokenizer.json or tiktoken file.  Every contender is a program of
its own.  It takes the same documents (by default the standard library's sources) from a JSONL file
to their ids; ``prepare`` writes the whole dataset, with two processes.  With ``--rows``, such as
gsm8k's train.jsonl, ``prepare --template dolly`` runs against ``datasets.map``, also without the
time that this takes to import and to load the tokenizer.  FOLDER holds the sources of an older
build.  After one round that is not counted rounds are interleaved, A B A B; medians of processor
seconds are reported, of all processes together, because the machine may be busy.  Peers that are
not installed are left out.

``--memory`` encodes as many GB in one process: the documents again and again, an eighth of the text
being words that never occurred before; the resident memory is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
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
from llamax.data.tokenizer.fast_engine import resident_bytes
from llamax.data.tokenizer.hf_export import export_tokenizer
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

# A program with the arguments ROWS FOLDER CACHE BATCHED: rows to ids, as users of datasets do it.
# It prints the processor seconds without imports and the tokenizer.
MAP = """
import sys, time
import datasets, transformers
rows, folder, cache, batched = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
datasets.disable_progress_bars()
began = time.process_time()

def text(question, answer):
    return f"### Instruction\\n{question}\\n\\n### Answer\\n{answer}{tokenizer.eos_token}"

def encode(row):
    if batched == "True":
        texts = [*map(text, row["question"], row["answer"])]
    else:
        texts = text(row["question"], row["answer"])
    return {"input_ids": tokenizer(texts)["input_ids"]}

table = datasets.load_dataset("json", data_files=rows, split="train", cache_dir=cache)
table.map(encode, batched=batched == "True")
print(time.process_time() - began)
"""


def documents(paths: list[Path], megabytes: float) -> list[str]:
    """Documents up to a size: UTF-8 text files as they are, spread over all that there are."""
    texts = []
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            skip = {"site-packages", "__pycache__"} & set(file.relative_to(path).parts)
            if file.suffix in (".py", ".txt", ".md", ".rst", ".csv", ".jsonl") and not skip:
                try:
                    texts.append(file.read_text(encoding="utf-8"))
                except UnicodeDecodeError:
                    continue
    total = sum(map(len, texts)) / 1e6
    return [text for text in texts[:: max(1, round(total / megabytes))] if text]


def run(command: list[str], folder: Path, compiled: Path) -> tuple[float, str]:
    """Processor seconds of a program and its children, and what it printed.

    It is started in ``folder``; ``compiled`` keeps its bytecode.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    variables |= {"OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": str(compiled)}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def engines(rows: Path, tokenizer: Path, folder: Path) -> dict[str, tuple[list[str], Path]]:
    """The contenders for text, by their names: engines by their own interfaces."""
    kind = {".json": "tokenizers", ".tiktoken": ""}.get(tokenizer.suffix, "sentencepiece")
    return {
        f"{name} alone": ([sys.executable, "-c", program, str(rows), str(tokenizer)], folder)
        for name, program in PEERS.items()
        if name in (kind, "gigatoken") and find_spec(name)
    }


def maps(rows: Path, tokenizer: Path, folder: Path) -> dict[str, tuple[list[str], Path]]:
    """The contenders for rows, by their names: ``datasets.map`` with a fast tokenizer."""
    if not (find_spec("datasets") and find_spec("transformers")):
        return {}
    export_tokenizer(load_tokenizer(tokenizer), folder / "hub")
    words = [sys.executable, "-c", MAP, str(rows), str(folder / "hub"), str(folder / "cache")]
    return {
        "datasets.map": ([*words, "False"], folder),
        "datasets.map, batched": ([*words, "True"], folder),
    }


def race(args: argparse.Namespace, texts: list[str]) -> None:
    """Measure ``prepare`` and its peers on texts, or on rows, and print a table."""
    here = Path(__file__).resolve().parents[1]
    tokenizer = args.tokenizer.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows, out = folder / "rows.jsonl", folder / "out"
        if args.rows:
            lines = args.rows.read_text(encoding="utf-8").splitlines(keepends=True)
            rows.write_text("".join(lines[: args.limit or None]), encoding="utf-8")
            amount, unit = float(min(args.limit or len(lines), len(lines))), "rows"
        else:
            rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            amount, unit = sum(len(text.encode()) for text in texts) / 1e6, "MB"
        words = ["-m", "llamax", "prepare", str(rows), "--tokenizer", str(tokenizer)]
        words += ["--workers", "2", "--validation", "0", "--out", str(out)]
        whole = [sys.executable, *words, *(["--template", "dolly"] if args.rows else [])]
        contenders = {"llamax prepare": (whole, here)}
        if args.old:
            contenders["llamax prepare, the older build"] = (whole, args.old)
        contenders |= (maps if args.rows else engines)(rows, tokenizer, folder)
        times: dict[str, list[float]] = {}
        for turn in range(args.rounds + 1):
            for name, (command, place) in contenders.items():
                shutil.rmtree(out, ignore_errors=True)
                shutil.rmtree(folder / "cache", ignore_errors=True)
                seconds, printed = run(command, place, folder / "compiled")
                if turn:
                    times.setdefault(name, []).append(seconds)
                    if name.startswith("datasets"):
                        alone = times.setdefault(f"{name}, without its start", [])
                        alone.append(float(printed.split()[-1]))
        shutil.rmtree(out, ignore_errors=True)
        run(whole, here, folder / "compiled")
        equal = ""
        if not args.rows:
            equal = f"; {same_ids(out, texts, tokenizer)} have the ids of the reference"
    print(f"{len(texts) or 'no'} documents, {amount:,.1f} {unit}{equal}")
    names = ("gigatoken", "sentencepiece", "tokenizers", "tiktoken", "numpy", "datasets")
    versions = (f"{name} {version(name)}" for name in names if find_spec(name))
    print(f"Python {platform.python_version()}, " + ", ".join(versions))
    print(f"\n| contender | CPU s | {unit} per CPU s | llamax is |\n|---|---|---|---|")
    ours = statistics.median(times["llamax prepare"])
    for name, taken in times.items():
        median = statistics.median(taken)
        print(f"| {name} | {median:.2f} | {amount / median:,.1f} | {median / ours:.2f} times |")


def memory(tokenizer: Path, texts: list[str], gigabytes: float) -> None:
    """Encode so many GB, an eighth of them words that are new, and print the resident memory."""
    engine = load_tokenizer(tokenizer)
    if why := engine.speed_up():
        raise SystemExit(f"{tokenizer}: {why}")
    draw, done, shown, peak, start = random.Random(0), 0, 0.0, 0, resident_bytes()
    print(f"at the start {start / 2**20:.0f} MiB", flush=True)
    while done < gigabytes * 1e9:
        for text in texts:
            new = [f"{draw.getrandbits(60):x}" for _ in range(len(text) // 112)]
            text += " ".join(new)
            engine.encode_documents([text])
            done += len(text.encode())
            peak = max(peak, resident_bytes())
            if done >= min(shown + gigabytes / 10, gigabytes) * 1e9:
                shown = done / 1e9
                print(f"after {shown:.2f} GB at most {peak / 2**20:.0f} MiB", flush=True)
            if done >= gigabytes * 1e9:
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tokenizer", type=Path, help="tokenizer.model, tokenizer.json or .tiktoken")
    parser.add_argument("--old", type=Path, help="sources of an older build")
    parser.add_argument("--paths", nargs="+", type=Path, help="documents, or folders of them")
    parser.add_argument("--rows", type=Path, help="rows of questions and answers (JSONL)")
    parser.add_argument("--limit", type=int, default=0, help="number of rows, from the first")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--memory", type=float, metavar="GB", help="text to encode in one process")
    args = parser.parse_args()
    paths = args.paths or [Path(sysconfig.get_paths()["stdlib"])]
    texts = [] if args.rows else documents(paths, args.megabytes)
    if args.memory:
        memory(args.tokenizer, texts, args.memory)
    else:
        race(args, texts)


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
