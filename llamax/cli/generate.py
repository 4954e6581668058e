"""``llamax generate MODEL --prompt "def "``: continue prompts with a trained model.

Under torchrun the ranks are one tensor-parallel axis, and rank 0 prints.  A prompt starts with a
BOS token if the tokenizer adds one; ``--bos`` and ``--no-bos`` decide otherwise.  ``--template``
formats questions as training did; ``--compare`` shows the answers of several models side by side.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llamax.cli.options import Parser, add_computing, column, command, pairs
from llamax.config.choices import BACKENDS
from llamax.data.chat.templates import BUILT_IN
from llamax.data.prepare.row_samples import FIELDS
from llamax.parallel.rendezvous import rendezvous
from llamax.runtime.errors import ConfigError
from llamax.runtime.logging import bars_aside, logger, setup_logging
from llamax.runtime.process import run_main
from llamax.runtime.text import encodable, print_text
from llamax.runtime.units import count


def parser() -> Parser:
    """The command line."""
    p = Parser(
        prog="llamax generate",
        description="Continue prompts with a trained Llama. Alone it runs on one rank; under "
        "torchrun all ranks share the model (tensor parallelism).",
        allow_abbrev=False,
    )
    p.add_argument(
        "model",
        type=Path,
        nargs="?",
        help="Hugging Face folder, run folder, checkpoint step, or a folder of adapters",
    )
    p.add_argument(
        "--compare", metavar="BASE,TUNED", help="two models or more instead of one, side by side"
    )
    p.add_argument(
        "--base", default="", metavar="PATH", help="base of adapters, if not where they write"
    )
    p.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    p.add_argument(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help="one prompt per line, or a table (.jsonl, .json, .csv, .tsv, .parquet) with a field "
        '"prompt"; with --template rows of questions',
    )
    p.add_argument(
        "--limit", type=int, default=0, metavar="N", help="only the first N prompts (0: all)"
    )
    p.add_argument(
        "--template",
        default="",
        metavar="NAME|FILE",
        help=f"format of prompts: {', '.join(BUILT_IN)}, a file or a folder with one, or none "
        "(default: that of training)",
    )
    p.add_argument("--context", default="", metavar="TEXT", help="context of the questions")
    p.add_argument("--system", metavar="TEXT", help="system prompt (default: that of training)")
    p.add_argument(
        "--field",
        action="append",
        type=column,
        default=[],
        metavar="FIELD=COLUMN",
        help=f"rows: column of the {', '.join(FIELDS)}",
    )
    p.add_argument(
        "--max-new-tokens", type=int, default=100, metavar="N", help="tokens of an answer (100)"
    )
    p.add_argument(
        "--temperature", type=float, metavar="T", help="default: the model's, or 0.8; 0 is greedy"
    )
    p.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="draw among the K most likely; 0: all (default: the model's, or all)",
    )
    p.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw among the fewest that hold P of the probability (default: the model's, or 1)",
    )
    p.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the draws (default 0; prompt i adds i)"
    )
    p.add_argument("--greedy", action="store_true", help="always take the most likely token")
    p.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text, or at this special token; may be repeated",
    )
    p.add_argument(
        "--stop-id",
        action="append",
        type=int,
        default=[],
        metavar="ID",
        help="end at this token, besides the model's EOS; may be repeated",
    )
    p.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="start prompts with the BOS token (default: if the tokenizer adds it)",
    )
    p.add_argument(
        "--tokenizer", default="", metavar="PATH", help="default: the model's or its dataset's"
    )
    add_computing(p, BACKENDS)
    p.add_argument(
        "--length",
        type=int,
        default=0,
        metavar="N",
        help="backend xla: tokens of a prompt and its answer for which programs are compiled "
        "(default: those of the longest, rounded up)",
    )
    p.add_argument(
        "--batch", type=int, default=8, metavar="N", help="prompts computed at once (default 8)"
    )
    p.add_argument(
        "--precompile",
        action="store_true",
        help="backend xla: compile the programs of --batch and --length, generate nothing",
    )
    p.add_argument("--out", type=Path, metavar="FILE.jsonl", help="new file, a line per prompt")
    return p


@command
def main(argv: Sequence[str]) -> int:
    """Print the answers."""
    options = parser().parse_args(argv)
    rank = rendezvous(os.environ)
    setup_logging(f"rank {rank.rank}", main=rank.rank == 0)
    models = _models(options.model, options.compare)
    drawing = [name for name in ("temperature", "top_k", "top_p") if getattr(options, name)]
    if options.greedy and drawing:
        option = drawing[0].replace("_", "-")
        raise ConfigError(f"--greedy draws nothing, and --{option} is of drawing; leave one out")

    from llamax.inference.engine import Completion
    from llamax.inference.generate import GenerationSettings, compare, generate, precompile
    from llamax.inference.prompts import Prompt
    from llamax.inference.side_by_side import columns

    settings = GenerationSettings(
        max_new_tokens=options.max_new_tokens,
        temperature=0.0 if options.greedy else options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stop=options.stop,
        stop_ids=options.stop_id,
        bos=options.bos,
        template=options.template,
        context=options.context,
        system=options.system,
        fields=pairs("--field", options.field),
        batch=options.batch,
        dtype=options.dtype,
        backend=options.backend,
        threads=options.threads,
        quantize=options.quantize,
        limit=options.limit,
        length=options.length,
    )
    if options.precompile:
        if options.prompt or options.prompts_file or len(models) > 1:
            raise ConfigError("--precompile takes one model and no prompts; leave them out")
        number = precompile(
            models[0], settings, tokenizer=options.tokenizer, base=options.base, rank=rank
        )
        logger.info("precompiled %s; nothing was generated", count(number, "program"))
        return 0

    def show_completion(number: int, total: int, prompt: Prompt, completion: Completion) -> None:
        if total == 1:  # shown piece by piece
            write("\n")
        else:
            write(f"=== {number} of {total} ===\n{completion.prompt}{completion.text}\n")

    if len(models) == 1:
        generate(
            models[0],
            options.prompt,
            settings,
            prompts_file=options.prompts_file,
            tokenizer=options.tokenizer,
            base=options.base,
            out=options.out,
            rank=rank,
            show=write,
            on_completion=show_completion,
        )
        return 0
    found = compare(
        models,
        options.prompt,
        settings,
        prompts_file=options.prompts_file,
        tokenizer=options.tokenizer,
        base=options.base,
        out=options.out,
        rank=rank,
    )
    for number, (prompt, answers) in enumerate(found if rank.rank == 0 else [], 1):
        write(f"=== {number} of {len(found)} ===\n{prompt.text}\n")
        named = zip(models, answers, strict=True)
        write(columns(*(f"[{model}]\n{answer.text}" for model, answer in named)) + "\n")
    return 0


def write(text: str) -> None:
    """Print a model's text without a line break, at once.

    On a terminal characters that it would obey are escaped; a file or pipe gets the exact text.
    """
    if sys.stdout.isatty():
        with bars_aside(sys.stdout):
            print_text(text, end="")
    else:
        sys.stdout.write(encodable(text, sys.stdout))
        sys.stdout.flush()


def _models(model: Path | None, pair: str | None) -> list[Path]:
    """The models of the command line; ConfigError if there are none or too many."""
    if (model is None) == (pair is None):
        raise ConfigError("give one model's folder, or --compare BASE,TUNED")
    if model is not None:
        return [model]
    paths = [Path(part.strip()) for part in str(pair).split(",")]
    if len(paths) < 2:
        raise ConfigError(f"--compare={pair} names one model; use BASE,TUNED")
    return paths


if __name__ == "__main__":
    sys.exit(run_main(main))
