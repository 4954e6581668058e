"""``llamax evaluate MODEL --data DATASET`` or ``--test-file ROWS``: loss or scores of a model.

The loss is the mean over all tokens that count: of instruction data those of answers alone.  Under
torchrun the ranks are one tensor-parallel axis.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamax.cli.options import Parser, add_computing, column, command, pairs
from llamax.data.chat.templates import BUILT_IN
from llamax.data.prepare.row_samples import FIELDS
from llamax.parallel.rendezvous import rendezvous
from llamax.runtime.json_writer import to_json
from llamax.runtime.logging import setup_logging
from llamax.runtime.process import run_main
from llamax.runtime.text import print_text


def parser() -> Parser:
    """The command line."""
    p = Parser(
        prog="llamax evaluate",
        description="Loss and perplexity of a model on a prepared dataset, or exact match and "
        "ROUGE-L of its answers to the rows of a test file.",
        allow_abbrev=False,
    )
    p.add_argument("model", type=Path, help="Hugging Face folder, run, checkpoint or adapters")
    p.add_argument(
        "--data", type=Path, metavar="DATASET", help="folder of llamax prepare, or Megatron prefix"
    )
    p.add_argument("--split", default="validation", help="split of the dataset (%(default)s)")
    p.add_argument(
        "--sequence-length",
        type=int,
        default=0,
        metavar="N",
        help="tokens of a sample; default: those of the run, else the model's context",
    )
    p.add_argument(
        "--packing",
        choices=("auto", "best-fit", "concat", "padded"),
        default="auto",
        help="how documents fill samples, as data.packing of a run (default auto)",
    )
    p.add_argument(
        "--labels",
        choices=("answers", "all"),
        default="answers",
        help="tokens of instruction data that count in the loss (default answers)",
    )
    p.add_argument("--batches", type=int, default=0, metavar="N", help="only the first N; 0: all")
    p.add_argument("--test-file", type=Path, metavar="FILE", help="rows of questions and answers")
    p.add_argument(
        "--template",
        default="",
        help=f"{', '.join(BUILT_IN)}, or a file (default: that of training)",
    )
    p.add_argument("--system", metavar="TEXT", help="system prompt (default: that of training)")
    p.add_argument(
        "--field",
        action="append",
        type=column,
        default=[],
        metavar="FIELD=COLUMN",
        help=f"column of the {', '.join(FIELDS)}",
    )
    p.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N rows")
    p.add_argument(
        "--max-new-tokens",
        type=int,
        default=256,
        metavar="N",
        help="tokens of an answer (default 256)",
    )
    p.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end answers before this text"
    )
    p.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="start prompts with the BOS token (default: if the tokenizer adds it)",
    )
    p.add_argument(
        "--extract",
        type=_pattern,
        metavar="REGEX",
        help="compare only its last match: '#### (.*)' for gsm8k",
    )
    p.add_argument("--out", type=Path, metavar="FILE.jsonl", help="new file, a line per answer")
    p.add_argument("--json", action="store_true", help="print the numbers as JSON")
    p.add_argument("--tokenizer", default="", metavar="PATH", help="default: the model's own")
    p.add_argument("--base", default="", metavar="PATH", help="base of adapters")
    add_computing(p)
    p.add_argument(
        "--batch", type=int, default=8, metavar="N", help="samples at once (%(default)s)"
    )
    return p


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def show(numbers: dict[str, Any]) -> str:
    """Names and numbers, a line each."""
    return "\n".join(
        f"{name:<12} {f'{value:.4f}' if isinstance(value, float) else f'{value:,}'}"
        for name, value in numbers.items()
    )


@command
def main(argv: Sequence[str]) -> int:
    """Print the loss or the scores."""
    options = parser().parse_args(argv)
    rank = rendezvous(os.environ)
    setup_logging(f"rank {rank.rank}", main=rank.rank == 0)

    from llamax.inference.evaluate import evaluate

    numbers = evaluate(
        options.model,
        data=options.data,
        split=options.split,
        sequence_length=options.sequence_length,
        packing=options.packing,
        labels=options.labels,
        batches=options.batches,
        test_file=options.test_file,
        template=options.template,
        system=options.system,
        fields=pairs("--field", options.field),
        limit=options.limit,
        max_new_tokens=options.max_new_tokens,
        stop=options.stop,
        bos=options.bos,
        extract=options.extract,
        out=options.out,
        tokenizer=options.tokenizer,
        base=options.base,
        dtype=options.dtype,
        backend=options.backend,
        threads=options.threads,
        quantize=options.quantize,
        batch=options.batch,
        rank=rank,
    )
    if rank.rank == 0:
        print_text(to_json(numbers, indent=None) if options.json else show(numbers))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
