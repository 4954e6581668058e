"""``llamax prepare``: text to a dataset folder, in parallel, and again from where it was killed.

::

    inputs ──plan──> chunks ──workers──> OUT/.parts/*.tokens ──merge──> OUT/train.tokens
                                                                        OUT/validation.tokens
                                                                        OUT/tokenizer.model
                                                                        OUT/dataset.json, last

A part is named after everything that decides what is in it (the settings, the tokenizer, and the
path, size and time of the text), and appears whole or not at all.  So a second run takes the parts
it finds, whoever made them, and the result is the same bytes for any number of workers and after
any kill.  A document goes to the validation split if the hash of its text says so: copies of one
text never lie on both sides, and the order of the inputs does not matter.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llamax.data.corpus import Chunk, documents, plan
from llamax.data.files import room_for, write_atomic
from llamax.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from llamax.data.tokens import Header, TokenFile, TokenWriter
from llamax.errors import DataError

SPLITS = ("train", "validation")
BATCH_CHARACTERS = 2**20


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a dataset, beside the text; ``tokenizer`` is a fingerprint."""

    tokenizer: str
    key: str
    validation: float
    bos: bool
    eos: bool

    def name(self, number: int, chunk: Chunk) -> str:
        """The name of a part: equal names, equal bytes."""
        told = json.dumps([asdict(self), [asdict(source) for source in chunk]])
        return f"{number:06d}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"


def is_validation(text: bytes, fraction: float) -> bool:
    """Whether a document belongs to the validation split."""
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return number < fraction * 2**64


def make_part(
    folder: Path, name: str, chunk: Chunk, settings: Settings, tokenizer_path: Path
) -> Path:
    """Tokenise a chunk into ``folder/name.{train,validation}.tokens``, unless they are there."""
    paths = [folder / f"{name}.{split}.tokens" for split in SPLITS]
    if all(map(_sound, paths)):
        return folder / name
    tokenizer = _tokenizer(tokenizer_path)
    header = Header(
        settings.tokenizer,
        tokenizer.vocab_size,
        tokenizer.bos_id if settings.bos else None,
        tokenizer.eos_id if settings.eos else None,
    )
    size = sum(source.stop - source.start for source in chunk)
    with (
        room_for(folder, size * header.dtype.itemsize),
        TokenWriter(paths[0], header) as train,
        TokenWriter(paths[1], header) as validation,
    ):
        for texts in _batches(documents(chunk, settings.key)):
            raw = [text.encode() for text in texts]
            held_out = [is_validation(each, settings.validation) for each in raw]
            ids = tokenizer.encode_documents(texts)
            for writer, side in ((train, False), (validation, True)):
                mine = [i for i, where in enumerate(held_out) if where is side]
                _add(writer, [ids[i] for i in mine], sum(len(raw[i]) for i in mine))
    return folder / name


def _add(writer: TokenWriter, ids: Sequence[np.ndarray], text_bytes: int) -> None:
    header = writer.header
    bos = np.array([] if header.bos_id is None else [header.bos_id], np.uint32)
    eos = np.array([] if header.eos_id is None else [header.eos_id], np.uint32)
    lengths = np.array([len(bos) + len(each) + len(eos) for each in ids], np.int64)
    pieces = chain.from_iterable((bos, each, eos) for each in ids)
    writer.add(np.concatenate([*pieces, np.array([], np.uint32)]), lengths, text_bytes)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Non-empty texts, about BATCH_CHARACTERS at a time."""
    batch: list[str] = []
    held = 0
    for text in texts:
        if text:
            batch.append(text)
            held += len(text)
        if held > BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    yield batch


def _sound(path: Path) -> bool:
    try:
        TokenFile(path)
    except DataError:
        return False
    return True


@lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    return load_tokenizer(path)


def _leave_with_parent() -> None:
    """A worker whose parent was killed ends too, instead of waiting for work for ever."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make_parts(
    chunks: Sequence[Chunk],
    folder: Path,
    settings: Settings,
    tokenizer_path: Path,
    workers: int,
) -> list[Path]:
    """All parts in order, made by ``workers`` processes, with a progress bar on a terminal."""
    jobs = [
        (folder, settings.name(i, chunk), chunk, settings, tokenizer_path)
        for i, chunk in enumerate(chunks)
    ]
    sizes = [sum(source.stop - source.start for source in chunk) for chunk in chunks]
    parts: list[Path] = [folder] * len(jobs)
    tokens, start = 0, time.perf_counter()
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, disable=None, desc="tokenising") as bar:

        def done(i: int, part: Path) -> None:
            nonlocal tokens
            parts[i] = part
            tokens += sum(
                len(TokenFile(part.with_name(f"{part.name}.{split}.tokens"), "off"))
                for split in SPLITS
            )
            rate = tokens / (time.perf_counter() - start)
            bar.set_postfix_str(f"{tokens:,} tokens, {rate:,.0f} tokens/s", refresh=False)
            bar.update(sizes[i])

        if workers == 1 or len(jobs) == 1:
            for i, job in enumerate(jobs):
                done(i, make_part(*job))
            return parts
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            min(workers, len(jobs)), context, initializer=_leave_with_parent
        ) as pool:
            futures: dict[Future[Path], int] = {
                pool.submit(make_part, *job): i for i, job in enumerate(jobs)
            }
            try:
                for future in as_completed(futures):
                    done(futures[future], future.result())
            except BrokenProcessPool:
                raise DataError(
                    f"a worker of {workers} died, perhaps for want of memory; run the same "
                    "command again with fewer --workers: finished parts are kept"
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)
    return parts


def merge(parts: Sequence[Path], split: str, out: Path) -> TokenFile | None:
    """Join the parts of a split into ``out/split.tokens``; None, and no file, if it is empty."""
    files = [TokenFile(part.with_name(f"{part.name}.{split}.tokens"), "off") for part in parts]
    path = out / f"{split}.tokens"
    if not any(map(len, files)):
        path.unlink(missing_ok=True)
        return None
    size = sum(sum(file.header.sections["checksums"]) for file in files)
    with room_for(out, size), TokenWriter(path, files[0].header) as writer:
        for part in parts:
            file = TokenFile(part.with_name(f"{part.name}.{split}.tokens"))
            lengths = np.diff(file.documents.astype(np.int64))
            writer.add(file.tokens, lengths, file.header.text_bytes)
    return TokenFile(path, "off")


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
