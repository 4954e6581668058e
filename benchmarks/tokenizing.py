"""Speed of encoding text to sentencepiece ids, beside its own encoder and HF tokenizers.

    python benchmarks/tokenizing.py TOKENIZER.model [--paths FOLDER_OR_FILE ...] [--rounds 5]

Every contender encodes the same documents (by default the standard library's sources) on the same
number of cores.  Pools are up before the clock starts, but nothing has been encoded, so nothing is
cached.  Rounds are interleaved, A B C A B C; the median is reported with its ratio to each peer.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

from llamax.cli.prepare import main as prepare
from llamax.data.tokenizer.hf_export import export_tokenizer
from llamax.data.tokenizer.tokenizer import SentencePiece, load_tokenizer

BATCH_BYTES = 2**18

Documents = Sequence[str]


def read(paths: Sequence[Path], megabytes: float) -> list[str]:
    """Documents up to a size: UTF-8 text files as they are, spread over all that there are."""
    texts = []
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            skip = {"site-packages", "test", "tests", "__pycache__"} & set(file.parts)
            if file.suffix in (".py", ".txt", ".md", ".rst", ".csv", ".jsonl") and not skip:
                try:
                    texts.append(file.read_text(encoding="utf-8"))
                except UnicodeDecodeError:
                    continue
    total = sum(map(len, texts)) / 1e6
    return texts[:: max(1, round(total / megabytes))]


# ---- what pool workers do

_engine: tokenizers.Tokenizer
_ours: SentencePiece


def start_hf(path: str) -> None:
    global _engine
    _engine = tokenizers.Tokenizer.from_file(path)


def start_ours(path: str) -> None:
    global _ours
    _ours = load_tokenizer(path)


def encode_hf(text: str) -> list[int]:
    return _engine.encode(text, add_special_tokens=False).ids


def encode_ours(texts: Documents) -> list[np.ndarray]:
    return _ours.encode_documents(texts)


def batches(texts: Documents) -> list[list[str]]:
    out: list[list[str]] = [[]]
    held = 0
    for text in texts:
        if held > BATCH_BYTES:
            out.append([])
            held = 0
        out[-1].append(text)
        held += len(text)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", help="a sentencepiece tokenizer.model")
    parser.add_argument("--paths", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--megabytes", type=float, default=11)
    args = parser.parse_args()
    paths = args.paths or [Path(sysconfig.get_paths()["stdlib"])]
    texts = read(paths, args.megabytes)
    size = sum(len(text.encode()) for text in texts)
    raw = Path(args.tokenizer).read_bytes()
    own = sentencepiece.SentencePieceProcessor(model_proto=raw)
    ours = load_tokenizer(args.tokenizer)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        export_tokenizer(ours, folder)
        hub = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
        with (
            context.Pool(args.cores, start_hf, (f"{folder}/tokenizer.json",)) as hf_pool,
            context.Pool(args.cores, start_ours, (args.tokenizer,)) as our_pool,
        ):
            hf_pool.map(encode_hf, [""] * 8)
            our_pool.map(encode_ours, [[""]] * 8)
            contenders: dict[str, Callable[[], Sequence[object]]] = {
                f"llamax, {args.cores} processes": lambda: [
                    ids for part in our_pool.imap(encode_ours, batches(texts)) for ids in part
                ],
                f"sentencepiece encode(list, num_threads={args.cores})": lambda: own.encode(
                    texts, num_threads=args.cores
                ),
                f"pool of {args.cores}, HF tokenizer, document by document": lambda: list(
                    hf_pool.imap(encode_hf, texts, 25)
                ),
                f"HF encode_batch_fast, {args.cores} threads": lambda: hub.encode_batch_fast(
                    texts, add_special_tokens=False
                ),
                "llamax, 1 thread": lambda: ours.encode_documents(texts),
                "sentencepiece, 1 thread": lambda: own.encode(texts, num_threads=1),
            }
            times: dict[str, list[float]] = {name: [] for name in contenders}
            for _ in range(args.rounds):
                for name, contender in contenders.items():
                    start = time.perf_counter()
                    found = contender()
                    times[name].append(time.perf_counter() - start)
                    assert len(found) == len(texts)
        truth = own.encode(texts)
        equal = sum(
            mine.tolist() == their
            for mine, their in zip(ours.encode_documents(texts), truth, strict=True)
        )
        tokens = sum(map(len, truth))
        started = time.perf_counter()
        for i, text in enumerate(texts):
            Path(folder, "text").mkdir(exist_ok=True)
            Path(folder, "text", f"{i:06}.txt").write_text(text, encoding="utf-8")
        started = time.perf_counter()
        command = [f"{folder}/text", "--tokenizer", args.tokenizer, "--out", f"{folder}/out"]
        prepare([*command, "--workers", str(args.cores)])
        whole = time.perf_counter() - started
    best = statistics.median(next(iter(times.values())))
    names = ("sentencepiece", "tokenizers", "tiktoken", "numpy")
    print(f"\n{len(texts)} documents, {size / 1e6:.1f} MB, {tokens:,} tokens; equal ids: {equal}")
    print(f"Python {platform.python_version()}, " + ", ".join(f"{n} {version(n)}" for n in names))
    print("\n| contender | MB/s | tokens/s | llamax is |\n|---|---|---|---|")
    for name, taken in times.items():
        median = statistics.median(taken)
        ratio = f"{median / best:.2f} times" if name != next(iter(times)) else ""
        print(f"| {name} | {size / 1e6 / median:.1f} | {tokens / median:,.0f} | {ratio} |")
    print(f"| llamax prepare, files to dataset, start-up and all | {size / 1e6 / whole:.1f} "
          f"| {tokens / whole:,.0f} | |")  # fmt: skip


if __name__ == "__main__":
    main()
