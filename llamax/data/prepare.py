"""``llamax prepare``: text to a dataset folder, in parallel, and again from where it was killed.

::

    inputs ──plan──> chunks ──workers──> OUT/.parts/*.tokens ──merge──> OUT/train.tokens
                                                                        OUT/validation.tokens
                                                                        OUT/tokenizer.model
                                                                        OUT/dataset.json, last

Killed, it goes on when the same command is given again; ``llamax.data.parts`` says how.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np

from llamax.data.corpus import Chunk, documents, plan
from llamax.data.files import room_for, write_atomic
from llamax.data.parts import SPLITS, Settings, is_validation, make_parts, merge
from llamax.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from llamax.data.tokens import TokenFile
from llamax.errors import DataError


def unigram_entropy(file: TokenFile) -> tuple[float, int]:
    """Entropy of the split's tokens taken one by one, in nats, and how many kinds occur."""
    counts = np.zeros(file.header.vocab_size, np.int64)
    for start in range(0, len(file), 2**22):
        counts += np.bincount(file.tokens[start : start + 2**22], minlength=len(counts))
    seen = counts[counts > 0]
    p = seen / seen.sum()
    return float(-(p * np.log(p)).sum()), len(seen)


def prepare(args: argparse.Namespace) -> None:
    """Make the dataset that the parsed command line describes, and say what was made."""
    out = Path(args.out)
    chunks = plan(args.inputs, args.glob or ["*"], args.exclude)
    _make_folder(out)
    folder = out / ".parts"
    folder.mkdir(exist_ok=True)
    if args.train_tokenizer:
        path = _train(chunks, args, folder)
    else:
        path = Path(args.tokenizer)
    tokenizer = load_tokenizer(path)
    settings = Settings(
        tokenizer.fingerprint,
        args.key,
        args.validation,
        args.bos and tokenizer.bos_id is not None,
        args.eos and tokenizer.eos_id is not None,
    )
    names = [settings.name(i, chunk) for i, chunk in enumerate(chunks)]
    identity = hashlib.sha256("\n".join(names).encode()).hexdigest()
    if not _already(out, settings, identity):
        parts = make_parts(chunks, folder, settings, tokenizer.path, args.workers)
        train = merge(parts, "train", out)
        merge(parts, "validation", out)
        if train is None:
            raise DataError(
                f"{', '.join(args.inputs)}: no document is left for training; give more text, or "
                f"a smaller --validation than {args.validation}"
            )
        shutil.copyfile(tokenizer.path, out / tokenizer_name(tokenizer))
        said = {
            "identity": identity,
            **asdict(settings),
            "tokenizer_file": tokenizer_name(tokenizer),
            "trained": path.stem if args.train_tokenizer else None,
        }
        write_atomic(out / "dataset.json", (json.dumps(said, indent=2) + "\n").encode())
    shutil.rmtree(folder)
    print(describe(out))


def tokenizer_name(tokenizer: Tokenizer) -> str:
    """The name under which a dataset keeps a tokenizer's file."""
    kind = type(tokenizer).__name__
    return {"SentencePiece": "tokenizer.model", "HuggingFace": "tokenizer.json"}.get(
        kind, "tokenizer.tiktoken"
    )


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be made ({error.strerror}); choose another --out") from None


def _already(out: Path, settings: Settings, identity: str) -> bool:
    """Whether ``out`` holds this very dataset; DataError if it holds another."""
    marker = out / "dataset.json"
    if not marker.exists():
        return False
    said = json.loads(marker.read_text())
    for key, value in asdict(settings).items():
        if said.get(key) != value:
            raise DataError(
                f"{out}: holds another dataset, with {key}={said.get(key)} instead of {value}; "
                "choose another --out, or remove that folder"
            )
    if said["identity"] != identity:
        raise DataError(
            f"{out}: holds a dataset of other text, or of an earlier state of this text; choose "
            "another --out, or remove that folder"
        )
    return True


def _train(chunks: Sequence[Chunk], args: argparse.Namespace, folder: Path) -> Path:
    """A tokenizer trained on the training split; the one in ``folder`` if it was made before."""
    settings = Settings("", args.key, args.validation, args.bos, args.eos)
    told = [settings.name(args.train_tokenizer, chunk) for chunk in chunks]
    name = hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]
    out, path = folder.parent, folder / f"{name}.model"
    if (out / "dataset.json").exists():
        if json.loads((out / "dataset.json").read_text()).get("trained") == name:
            return out / "tokenizer.model"
        raise DataError(
            f"{out}: holds another dataset, with another tokenizer; choose another --out, or "
            "remove that folder"
        )
    if not path.exists():
        print(f"training a tokenizer of {args.train_tokenizer} pieces", file=sys.stderr)
        texts = chain.from_iterable(documents(chunk, args.key) for chunk in chunks)
        own = (text for text in texts if not is_validation(text.encode(), args.validation))
        with room_for(folder, 2**20):
            train_sentencepiece(own, args.train_tokenizer, path)
    return path


def describe(out: Path) -> str:
    """What a dataset folder holds, in a few lines."""
    lines = [f"made {out}"]
    for split in SPLITS:
        path = out / f"{split}.tokens"
        if path.exists():
            file = TokenFile(path, "off")
            entropy, kinds = unigram_entropy(file)
            head = file.header
            lines.append(
                f"  {split + '.tokens':18} {head.documents:,} documents, {head.tokens:,} tokens, "
                f"{head.text_bytes / head.tokens:.2f} bytes/token, unigram entropy {entropy:.3f} "
                f"nats, {kinds / head.vocab_size:.1%} of the vocabulary"
            )
        else:
            lines.append(f"  {split}.tokens: none, no document fell into it")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="llamax prepare",
        description="Turn text into a packed-token dataset: one document per text file or JSONL "
        "row. A run that was killed continues when the same command is given again.",
    )
    p.add_argument("inputs", nargs="+", help="text or JSONL files, plain or .gz, or folders")
    p.add_argument("--out", required=True, help="dataset folder to make")
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--tokenizer", help="tokenizer.model, tokenizer.json, .tiktoken or a folder")
    which.add_argument(
        "--train-tokenizer", type=_count, metavar="VOCAB", help="train one of so many pieces"
    )
    p.add_argument("--key", default="text", help="JSONL: which key holds the text (%(default)s)")
    p.add_argument(
        "--glob", action="append", metavar="PATTERN", help="folders: names to take, e.g. '*.py'"
    )
    p.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="folders: names to leave"
    )
    p.add_argument(
        "--validation",
        type=_fraction,
        default=0.01,
        help="share of documents held out (%(default)s)",
    )
    p.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start documents with the BOS token, if there is one",
    )
    p.add_argument(
        "--eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end documents with the EOS token, if there is one",
    )
    p.add_argument(
        "--workers", type=_count, default=os.cpu_count() or 1, help="processes (%(default)s)"
    )
    return p


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _fraction(text: str) -> float:
    try:
        if 0 <= float(text) < 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more and below 1")


def main(argv: Sequence[str]) -> int:
    """Run the program; 0 if the dataset is there.  Mistakes are raised as LlamaxError."""
    prepare(parser().parse_args(argv))
    return 0
