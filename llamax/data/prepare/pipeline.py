"""``llamax prepare``: text to a dataset folder, in parallel, and again from where it was killed.

::

    inputs ──plan──> chunks ──workers──> OUT/.parts/*.tokens ──merge──> OUT/train.tokens
                                                                        OUT/validation.tokens
                                                                        OUT/tokenizer.model
                                                                        OUT/dataset.json, last

With ``--format megatron`` the splits become Megatron's .bin and .idx, see ``llamax.data.megatron``.
With ``--template`` the inputs are rows of questions and answers, see
``llamax.data.prepare.instruction_rows``.
Killed, it goes on when the same command is given again; ``llamax.data.prepare.chunks`` says how.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from llamax.data.chat.jinja_sandbox import Program
from llamax.data.chat.templates import forgotten, source_of
from llamax.data.prepare.chunks import (
    SPLITS,
    Chunk,
    Settings,
    Texts,
    TextSettings,
    header_of,
    is_validation,
    make_parts,
    merge,
    merge_indexed,
    room_for,
    tokenizer_in,
)
from llamax.data.prepare.instruction_rows import InstructSettings, SplitRun, texts
from llamax.data.prepare.summary import describe
from llamax.data.prepare.tables import is_hub, plan_tables
from llamax.data.prepare.text_files import documents, plan
from llamax.data.token_file import TokenFile
from llamax.data.tokenizer.tokenizer import (
    HuggingFace,
    Tokenizer,
    tokenizer_file,
    train_sentencepiece,
)
from llamax.runtime.errors import DataError
from llamax.runtime.files import write_atomic


def prepare(args: argparse.Namespace) -> None:
    """Make the dataset that the parsed command line describes, and say what was made."""
    out, began = Path(args.out), time.perf_counter()
    _check_options(args)
    folder = out / ".parts"
    chunks = _runs(args, folder) if args.template else _texts(args)
    _make_folder(folder)
    if args.train_tokenizer:
        path = _train(chunks, args, folder)
    else:
        path = Path(args.tokenizer)
    tokenizer = tokenizer_in(tokenizer_file(path))
    settings = _settings(args, tokenizer)
    names = [settings.name(i, chunk) for i, chunk in enumerate(chunks)]
    identity = hashlib.sha256("\n".join(names).encode()).hexdigest()
    if not _already(out, settings, identity, args.format):
        parts = make_parts(chunks, folder, settings, tokenizer.path, args.workers)
        if args.format == "megatron":
            found = {split: merge_indexed(parts, split, out, args.key) for split in SPLITS}
        else:
            found = {split: merge(parts, split, out) is not None for split in SPLITS}
        if not found["train"]:
            smaller = f", or a smaller --validation than {args.validation}"
            raise DataError(
                f"{', '.join(args.inputs)}: no document is left for training; give more text"
                f"{smaller if found['validation'] else ''}"
            )
        shutil.copyfile(tokenizer.path, out / tokenizer_name(tokenizer))
        for path in tokenizer.beside if isinstance(tokenizer, HuggingFace) else ():
            shutil.copyfile(path, out / path.name)
        said = {
            "identity": identity,
            **_plain(settings),
            "tokenizer_file": tokenizer_name(tokenizer),
            "trained": path.stem if args.train_tokenizer else None,
            "indexed": _indexed(settings, tokenizer) if args.format == "megatron" else None,
        }
        write_atomic(out / "dataset.json", (json.dumps(said, indent=2) + "\n").encode())
    shutil.rmtree(folder)
    print(describe(out, args.length))
    if args.template:
        print(_told(chunks, out, time.perf_counter() - began))


def _indexed(settings: Settings, tokenizer: Tokenizer) -> dict[str, object]:
    """What a Megatron dataset does not say of itself: fields of a Header."""
    header = header_of(settings, tokenizer)
    return {name: getattr(header, name) for name in ("vocab_size", "bos_id", "eos_id")}


def _texts(args: argparse.Namespace) -> list[Chunk]:
    out = Path(args.out).resolve()
    return [Texts(sources) for sources in plan(args.inputs, args.glob or ["*"], args.exclude, out)]


def _runs(args: argparse.Namespace, scratch: Path) -> list[Chunk]:
    """The runs of rows of every split."""
    if any(is_hub(given) for given in args.inputs):
        _make_folder(scratch)
    given = [("train", args.inputs, args.split)]
    given += [("validation", [path], "") for path in args.validation_file]
    given += [("test", [path], "") for path in args.test_file]
    return [
        SplitRun(run, split)
        for split, inputs, chosen in given
        for run in plan_tables(inputs, chosen, args.limit, scratch)
    ]


def _settings(args: argparse.Namespace, tokenizer: Tokenizer | None) -> Settings:
    """What decides the dataset's bytes; None: its tokenizer is still to be trained."""
    fingerprint = "" if tokenizer is None else tokenizer.fingerprint
    plain = args.format == "megatron"  # which adds nothing unless asked to
    bos, eos = (not plain if given is None else given for given in (args.bos, args.eos))
    bos = bos and (tokenizer is None or tokenizer.bos_id is not None)
    eos = eos and (tokenizer is None or tokenizer.eos_id is not None)
    if not args.template:
        return TextSettings(fingerprint, args.key, args.validation, bos, eos)
    source = source_of(args.template)
    reads = Program(source, f"template {args.template}").variables
    if args.system and reads.isdisjoint(("messages", "system")):
        raise forgotten(args.template, "system")
    fields = tuple(sorted(args.field))
    validation = 0.0 if args.validation_file else args.validation
    return InstructSettings(
        fingerprint,
        args.template,
        source,
        fields,
        args.system,
        validation,
        bos,
        eos,
        args.drop_empty,
    )


def _check_options(args: argparse.Namespace) -> None:
    """DataError for options of text with rows, and of rows with text."""
    for name in ("out", "tokenizer"):
        if getattr(args, name) == "":
            raise DataError(f"--{name} is empty; give a path")
    if args.template and args.format == "megatron":
        raise DataError(
            "--format megatron has no place for which tokens are answers; leave out --template or "
            "--format"
        )
    text = {"--glob": args.glob, "--exclude": args.exclude}
    table = {
        "--field": args.field,
        "--system": args.system,
        "--split": args.split,
        "--limit": args.limit,
        "--validation-file": args.validation_file,
        "--test-file": args.test_file,
        "--drop-empty": args.drop_empty,
    }
    for name, value in (text if args.template else table).items():
        if value:
            only = "text" if args.template else "rows, which --template asks for"
            raise DataError(f"{name} is for {only}; leave it out")


def _told(chunks: Sequence[Chunk], out: Path, seconds: float) -> str:
    """How many rows became how many samples, and how fast."""
    given = sum(chunk.size for chunk in chunks)
    paths = [out / f"{split}.tokens" for split in SPLITS]
    made = sum(TokenFile(path, "off").header.documents for path in paths if path.exists())
    dropped = f", {given - made:,} with an empty answer dropped" if given > made else ""
    return f"{given:,} rows{dropped}, in {seconds:.1f} s: {given / seconds:,.0f} rows/s"


def tokenizer_name(tokenizer: Tokenizer) -> str:
    """The name under which a dataset keeps a tokenizer's file."""
    kind = type(tokenizer).__name__
    return {"SentencePiece": "tokenizer.model", "HuggingFace": "tokenizer.json"}.get(
        kind, "tokenizer.tiktoken"
    )


def _make_folder(parts: Path) -> None:
    try:
        parts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{parts.parent}: cannot be made ({error.strerror}); choose another --out"
        ) from None


def _already(out: Path, settings: Settings, identity: str, form: str) -> bool:
    """Whether ``out`` holds this very dataset; DataError if it holds another."""
    marker = out / "dataset.json"
    if not marker.exists():
        return False
    said = json.loads(marker.read_text())
    if ("megatron" if said.get("indexed") else "llamax") != form:
        raise DataError(
            f"{out}: holds this or another dataset in the other format; choose another --out, or "
            "remove that folder"
        )
    for key, value in _plain(settings).items():
        if (other := said.get(key)) != value:
            raise DataError(
                f"{out}: holds another dataset, with {key}={_short(other)} instead of "
                f"{_short(value)}; choose another --out, or remove that folder"
            )
    if said["identity"] != identity:
        raise DataError(
            f"{out}: holds a dataset of other text, or of an earlier state of this text; choose "
            "another --out, or remove that folder"
        )
    return True


def _plain(settings: Settings) -> dict[str, object]:
    """Settings as JSON gives them back."""
    assert isinstance(settings, TextSettings | InstructSettings)
    plain: dict[str, object] = json.loads(json.dumps(asdict(settings)))
    return plain


def _short(value: object) -> str:
    return text if len(text := str(value)) <= 40 else f"{text[:37]!r}..."


def _train(chunks: Sequence[Chunk], args: argparse.Namespace, folder: Path) -> Path:
    """A tokenizer trained on the training split; the one in ``folder`` if it was made before."""
    settings = _settings(args, None)
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
        own = _own_texts(chunks, settings)
        with room_for(folder, 2**20):
            train_sentencepiece(own, args.train_tokenizer, path)
    return path


def _own_texts(chunks: Sequence[Chunk], settings: Settings) -> Iterable[str]:
    """The texts of the training split."""
    if isinstance(settings, InstructSettings):
        runs = (chunk for chunk in chunks if isinstance(chunk, SplitRun))
        return chain.from_iterable(texts(run, settings) for run in runs)
    assert isinstance(settings, TextSettings)
    read = (chunk for chunk in chunks if isinstance(chunk, Texts))
    found = chain.from_iterable(documents(chunk.sources, settings.key) for chunk in read)
    return (text for text in found if not is_validation(text.encode(), settings.validation))
