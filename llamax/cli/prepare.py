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
import os
from collections.abc import Sequence

from llamax.data.chat.templates import BUILT_IN
from llamax.data.prepare.instruction_rows import FIELDS, column
from llamax.data.prepare.pipeline import prepare


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="llamax prepare",
        description="Turn text into a packed-token dataset: one document per text file or JSONL "
        "row; or, with --template, one per row of questions and answers. A run that was killed "
        "continues when the same command is given again.",
    )
    p.add_argument(
        "inputs",
        nargs="+",
        help="text or JSONL files, plain or .gz, or folders; with --template JSONL, JSON, CSV, "
        "TSV or Parquet, or the name of a Hugging Face dataset",
    )
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
        help="start documents with the BOS token, if there is one (default, but not of megatron)",
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
        help="of the dataset: one file that proves itself, or Megatron's .bin and .idx",
    )
    p.add_argument(
        "--append-eod",
        dest="eos",
        action="store_const",
        const=True,
        help="Megatron's name of --eos",
    )
    p.add_argument(
        "--workers", type=_count, default=os.cpu_count() or 1, help="processes (%(default)s)"
    )
    p.add_argument(
        "--length",
        type=_count,
        default=0,
        metavar="TOKENS",
        help="also say how well the documents pack into samples of so many tokens",
    )
    _add_row_options(p.add_argument_group("rows of questions and answers"))
    return p


def _add_row_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--template",
        metavar="NAME|FILE",
        help=f"{', '.join(BUILT_IN)}, a Jinja file, a tokenizer_config.json or a folder with one",
    )
    group.add_argument(
        "--field",
        action="append",
        type=column,
        default=[],
        metavar="FIELD=COLUMN",
        help=f"which column is the {', '.join(FIELDS)}; default: the usual names",
    )
    group.add_argument("--system", default="", metavar="TEXT", help="what every sample begins with")
    group.add_argument("--split", default="", metavar="TRAIN[:10%]", help="a slice of the rows")
    group.add_argument("--limit", type=_count, default=0, metavar="N", help="the first N rows")
    group.add_argument("--validation-file", action="append", default=[], metavar="FILE")
    group.add_argument("--test-file", action="append", default=[], metavar="FILE")
    group.add_argument(
        "--drop-empty", action="store_true", help="leave out rows with an empty answer, and count"
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


def main(argv: Sequence[str]) -> int:
    """Run the program; 0 if the dataset is there.  Mistakes are raised as LlamaxError."""
    prepare(parser().parse_args(argv))
    return 0
