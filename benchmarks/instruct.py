"""Instruction data: packed against padded training, prepare against datasets.map, packing's memory.

    python benchmarks/instruct.py packing  ROWS TOKENIZER   # useful tokens a second
    python benchmarks/instruct.py prepare  ROWS TOKENIZER   # rows a second
    python benchmarks/instruct.py memory                    # of the index, by number of documents

ROWS is gsm8k's train.jsonl.  The sides of a race take turns in one process, one thread each, and
the medians of the ratios of CPU seconds are reported, because the machine may be busy.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from llamax.cli.prepare import main as prepare
from llamax.config.load import load_config
from llamax.config.schema import OptimConfig
from llamax.data.dataset import open_dataset
from llamax.data.header import Header
from llamax.data.packing import Packs
from llamax.data.samples import Samples
from llamax.data.token_file import TokenFile, TokenWriter
from llamax.model.llama import Llama
from llamax.ops import IGNORE_INDEX
from llamax.optim.zero import Zero
from llamax.parallel.collectives import Axes, Solo
from llamax.training.step import TrainState

LENGTH, BATCH, TURNS = 2048, 2, 2
DOCUMENTS = [250_000, 1_000_000, 4_000_000]


def packing(rows: Path, tokenizer: Path, folder: Path, length: int) -> None:
    """Steps of a small model on packed and on padded samples of the same rows."""
    prepare([str(rows), "--template", "dolly", "--tokenizer", str(tokenizer), "--validation", "0",
             "--limit", "200", "--out", str(folder / "data"), "--workers", "1"])  # fmt: skip
    file = open_dataset(folder / "data").train
    config = load_config("finetune-demo")
    model = Llama(replace(config.model, vocab_size=file.header.vocab_size)).init(0)
    axes = Axes(tp=Solo("tp"), data=Solo("data"), kv=Solo("kv"), world=Solo("world"))
    optimizer = Zero(model.sharded_parameters(), OptimConfig(), axes, sequence_parallel=False)
    state = TrainState(
        model, optimizer, axes, step_tokens=BATCH * length, learning_rate=lambda step: 1e-4
    )
    loaders = {}
    for way in ("best-fit", "padded"):
        data = replace(
            config.data, sequence_length=length, global_batch=BATCH, micro_batch=1, packing=way
        )
        loaders[way] = Samples(file, data, 0).loader(axes.data, 0, shuffle=True)
        print(f"{way}: {Samples(file, data, 0)}")
    rates: dict[str, list[float]] = {way: [] for way in loaders}
    for turn in range(TURNS + 1):
        for way, loader in loaders.items():
            batches = loader.step()
            useful = sum(int((b.documents < b.documents[:, -1:]).sum()) for b in batches)
            answers = sum(int((b.labels != IGNORE_INDEX).sum()) for b in batches)
            began = time.process_time()
            state.step(batches, turn + 1)
            seconds = time.process_time() - began
            if turn:
                rates[way].append(useful / seconds)
            print(f"  {way}: {useful} tokens ({answers} answers) in {seconds:.1f} CPU s")
    ratios = [a / b for a, b in zip(rates["best-fit"], rates["padded"], strict=True)]
    for way, found in rates.items():
        print(f"{way}: {statistics.median(found):,.0f} useful tokens per CPU second")
    print(f"packed / padded: {statistics.median(ratios):.1f}")


def against_map(rows: Path, tokenizer: Path, folder: Path) -> None:
    """llamax prepare, whole program, against datasets.map with a fast tokenizer: rows to ids."""
    if find_spec("datasets") is None:
        print("skipped: datasets is not installed")
        return
    import datasets
    import transformers

    from llamax.data.tokenizer.hf_export import export_tokenizer
    from llamax.data.tokenizer.tokenizer import load_tokenizer

    export_tokenizer(load_tokenizer(tokenizer), folder / "hub")
    fast = transformers.AutoTokenizer.from_pretrained(folder / "hub")
    datasets.disable_progress_bars()
    count = sum(1 for _ in rows.open())

    def encode(row: dict[str, str]) -> dict[str, object]:
        prompt = f"### Instruction\n{row['question']}\n\n### Answer\n"
        return {"input_ids": fast(prompt + row["answer"] + fast.eos_token)["input_ids"]}

    def theirs(turn: int) -> None:
        made = datasets.load_dataset(
            "json", data_files=str(rows), split="train", cache_dir=str(folder / f"cache{turn}")
        ).map(encode)
        assert len(made) == count

    def ours(turn: int) -> None:
        prepare([str(rows), "--template", "dolly", "--tokenizer", str(tokenizer), "--validation",
                 "0", "--out", str(folder / f"out{turn}"), "--workers", "1"])  # fmt: skip

    found: dict[str, list[float]] = {"llamax prepare": [], "datasets.map": []}
    for turn in range(TURNS):
        for name, run in (("llamax prepare", ours), ("datasets.map", theirs)):
            began = time.process_time()
            run(turn)
            found[name].append(count / (time.process_time() - began))
    for name, rates in found.items():
        print(f"{name}: {statistics.median(rates):,.0f} rows per CPU second")
    ratios = [a / b for a, b in zip(*found.values(), strict=True)]
    print(f"prepare / map: {statistics.median(ratios):.2f} (ours also finds the answers' tokens)")


def memory(folder: Path, counts: list[int]) -> None:
    """Peak memory and seconds of packing, each number of documents in a process of its own."""
    for documents in counts:
        path = folder / f"{documents}.tokens"
        random = np.random.default_rng(0)
        with TokenWriter(path, Header("", 256)) as writer:
            for _ in range(documents // 50_000):
                lengths = random.integers(2, 60, 50_000)
                tokens = np.zeros(int(lengths.sum()), np.uint16)
                writer.add(tokens, lengths, 1, np.ones(len(tokens), bool))
        done = subprocess.run(
            [sys.executable, __file__, "pack", str(path)],
            check=True,
            capture_output=True,
            text=True,
        )
        print(done.stdout.strip())
        path.unlink()


def pack(path: Path) -> None:
    """Pack one file and tell what it took beyond opening it."""
    import tracemalloc

    file = TokenFile(path, "off")
    tracemalloc.start()
    Packs(file, 2**9)
    _, heap = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    began = time.process_time()
    packs = Packs(file, 2**9)
    seconds = time.process_time() - began
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{file.header.documents:,} documents, {path.stat().st_size / 2**20:.0f} MiB: heap peak "
        f"{heap / 2**20:.1f} MiB, {seconds:.1f} CPU s, {packs.fill:.2%} filled "
        f"(resident with mapped files: {rss / 2**10:.0f} MiB)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("packing", "prepare", "memory", "pack"))
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens a sample (packing)")
    parser.add_argument("--documents", type=int, nargs="+", default=DOCUMENTS, metavar="COUNT",
                        help="documents of a file, in steps of 50,000 (memory)")  # fmt: skip
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({"torch": torch.__version__, "numpy": np.__version__}))
    if options.what == "pack":
        pack(*options.paths)
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "memory":
            memory(Path(folder), options.documents)
        elif options.what == "packing":
            packing(*options.paths, Path(folder), options.length)
        else:
            against_map(*options.paths, Path(folder))


if __name__ == "__main__":
    main()
