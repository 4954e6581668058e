"""``llamax prepare INPUT... --out DIR``: make a dataset of tokens from text or rows."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llamax.cli.options import Parser, column, command, folded, pairs, size
from llamax.data.chat.templates import BUILT_IN
from llamax.data.prepare.file_kinds import MAX_DOCUMENT
from llamax.data.prepare.row_samples import FIELDS
from llamax.runtime.cores import workers
from llamax.runtime.logging import setup_logging
from llamax.runtime.text import print_text

SPLIT = r"  .{18} "  # the name of a file, before its numbers


def parser() -> Parser:
    """The command line."""
    p = Parser(
        prog="llamax prepare",
        description="Turn text into a packed-token dataset: one document per text file or row; "
        "or, with --template, one per row of questions and answers. A run that was killed "
        "continues when the same command is given again.",
    )
    p.add_argument(
        "inputs",
        nargs="+",
        help="text files, rows as JSONL, JSON, CSV, TSV, Parquet or Arrow, or folders of them, "
        "also of save_to_disk; packed as .gz, .bz2, .xz or .zst too; "
        "or hf://datasets/org/name on the Hub",
    )
    p.add_argument("--out", required=True, help="dataset folder to make")
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--tokenizer",
        help="tokenizer.model, tokenizer.json, .tiktoken, a folder, or org/name on the Hub",
    )
    which.add_argument(
        "--train-tokenizer",
        type=_count,
        default=0,
        metavar="VOCAB",
        help="number of pieces of a tokenizer to train on the inputs",
    )
    p.add_argument("--key", default="text", help="rows: key or column of the text (%(default)s)")
    p.add_argument(
        "--glob", action="append", metavar="PATTERN", help="folders: names to take, e.g. '*.py'"
    )
    p.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="folders: names to skip"
    )
    p.add_argument(
        "--validation",
        type=_fraction,
        default=0.01,
        help="share of documents for validation (%(default)s)",
    )
    p.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="start documents with the BOS token (default: if the tokenizer adds it; megatron: no)",
    )
    p.add_argument(
        "--eos",
        action=argparse.BooleanOptionalAction,
        help="end documents with the EOS token, if there is one (default, but not of megatron)",
    )
    p.add_argument(
        "--format",
        choices=("llamax", "megatron"),
        default="llamax",
        help="one checked file for each split, or Megatron's .bin and .idx",
    )
    p.add_argument(
        "--append-eod",
        dest="eos",
        action="store_const",
        const=True,
        help="Megatron's name of --eos",
    )
    p.add_argument(
        "--workers",
        type=_count,
        default=workers(),
        help="processes; default: OMP_NUM_THREADS, or one per core",
    )
    p.add_argument(
        "--max-document",
        type=size,
        default=MAX_DOCUMENT,
        metavar="SIZE",
        help="longest row, or longest text without a place to cut, such as 64MiB (default) or 2GB; "
        "memory is at most 300 MB and 8 times this for each process",
    )
    p.add_argument(
        "--length",
        type=_count,
        default=0,
        metavar="TOKENS",
        help="also report how well documents pack into samples of this many tokens",
    )
    p.add_argument(
        "--strict",
        action="store_true",
        help="refuse rows with a column or key that is not read, instead of naming it",
    )
    _add_row_options(p.add_argument_group("rows of questions and answers"))
    return p


def _add_row_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--template",
        default="",
        metavar="NAME|FILE",
        help=f"{', '.join(BUILT_IN)}, a Jinja file, a tokenizer_config.json or a folder with one",
    )
    group.add_argument(
        "--field",
        action="append",
        type=column,
        default=[],
        metavar="FIELD=COLUMN",
        help=f"column of the {', '.join(FIELDS)}; default: the usual names",
    )
    group.add_argument(
        "--system", default="", metavar="TEXT", help="system prompt of samples without one"
    )
    group.add_argument("--split", default="", metavar="TRAIN[:10%]", help="slice of the rows")
    group.add_argument(
        "--limit", type=_count, default=0, metavar="N", help="number of rows, from the first"
    )
    group.add_argument(
        "--validation-file", action="append", default=[], metavar="FILE", help="rows to validate on"
    )
    group.add_argument(
        "--test-file", action="append", default=[], metavar="FILE", help="rows of the test split"
    )
    group.add_argument(
        "--drop-empty", action="store_true", help="skip rows with an empty answer, and count them"
    )


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


@command
def main(argv: Sequence[str]) -> int:
    """Make the dataset and print its summary."""
    options = parser().parse_args(argv)
    setup_logging()

    from llamax.data.prepare.pipeline import prepare
    from llamax.data.prepare.summary import (
        describe,
        describe_files,
        describe_rows,
        describe_unread,
    )

    made = prepare(
        options.inputs,
        options.out,
        tokenizer=options.tokenizer,
        train_tokenizer=options.train_tokenizer,
        key=options.key,
        glob=options.glob or ["*"],
        exclude=options.exclude,
        validation=options.validation,
        bos=options.bos,
        eos=options.eos,
        format=options.format,
        workers=options.workers,
        template=options.template,
        fields=pairs("--field", options.field),
        system=options.system,
        split=options.split,
        limit=options.limit,
        validation_files=options.validation_file,
        test_files=options.test_file,
        drop_empty=options.drop_empty,
        strict=options.strict,
        max_document=options.max_document,
    )
    lines = [*describe(made.folder, options.length).splitlines(), describe_files(made)]
    if options.template:
        lines.append(describe_rows(made))
    if made.unread:
        lines.append(describe_unread(made))
    print_text("\n".join(folded(lines, SPLIT)))
    return 0
