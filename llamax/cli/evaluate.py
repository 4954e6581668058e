"""The evaluating program: ``llamax evaluate MODEL --data DATASET`` or ``--test-file ROWS``.

::

    --data       packed dataset ──> summed loss, counted tokens ──> loss, perplexity
    --test-file  rows ──template──> prompts ──> answers ──> exact match, ROUGE-L

The loss is the mean over all counted tokens: of instruction data the answers alone.  MODEL is a
Hugging Face folder, a run, a checkpoint or a folder of adapters.  Under torchrun the ranks are one
tensor-parallel axis.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from llamax.backends import choose
from llamax.backends.base import EAGER
from llamax.cli.generate import TIMEOUT_S, new_file
from llamax.cli.options import column
from llamax.config.schema import Config, DataConfig, ParallelConfig
from llamax.config.validate import check
from llamax.data.chat.templates import BUILT_IN
from llamax.data.prepare.instruction_rows import FIELDS
from llamax.data.samples import Samples
from llamax.inference.engine import Engine, open_model
from llamax.inference.evaluate import answers_of, loss_of, open_split, read_test
from llamax.inference.prompts import Prompt, PromptFormat
from llamax.inference.sampling import Sampling, check_prompts
from llamax.model.llama import DTYPES
from llamax.parallel.collectives import Axis
from llamax.parallel.mesh import Mesh
from llamax.parallel.rendezvous import rendezvous
from llamax.runtime.errors import ConfigError
from llamax.runtime.logging import logger, setup_logging
from llamax.runtime.process import run_main


def show(found: dict[str, Any]) -> str:
    """What was found, a line each."""
    return "\n".join(
        f"{name:<12} {f'{value:.4f}' if isinstance(value, float) else f'{value:,}'}"
        for name, value in found.items()
    )


# --- the program ---------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(
        prog="llamax evaluate",
        description="Loss and perplexity of a model on a prepared dataset, or exact match and "
        "ROUGE-L of its answers to the rows of a test file.",
        allow_abbrev=False,
    )
    p.add_argument("model", type=Path, help="Hugging Face folder, run, checkpoint or adapters")
    p.add_argument("--data", type=Path, metavar="DATASET", help="folder that llamax prepare made")
    p.add_argument("--split", default="validation", help="of the dataset (%(default)s)")
    p.add_argument("--sequence-length", type=int, default=0, metavar="N", help="default: model's")
    p.add_argument("--packing", choices=("auto", "best-fit", "concat", "padded"), default="auto")
    p.add_argument("--labels", choices=("answers", "all"), default="answers")
    p.add_argument("--batches", type=int, default=0, metavar="N", help="only the first N; 0: all")
    p.add_argument("--test-file", type=Path, metavar="FILE", help="rows of questions and answers")
    p.add_argument("--template", default="", help=f"{', '.join(BUILT_IN)}, or a file")
    p.add_argument("--system", default="", metavar="TEXT", help="what every prompt begins with")
    p.add_argument(
        "--field",
        action="append",
        type=column,
        default=[],
        metavar="FIELD=COLUMN",
        help=f"which column is the {', '.join(FIELDS)}",
    )
    p.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N rows")
    p.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="(%(default)s)")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it")
    p.add_argument(
        "--extract",
        type=_pattern,
        metavar="REGEX",
        help="exact match of its last match alone: '#### (.*)' for gsm8k",
    )
    p.add_argument("--out", type=Path, metavar="FILE.jsonl", help="new file, a line per answer")
    p.add_argument("--json", action="store_true", help="print what was found as JSON")
    p.add_argument("--tokenizer", default="", metavar="PATH", help="default: the model's own")
    p.add_argument("--base", default="", metavar="PATH", help="of adapters")
    p.add_argument("--dtype", choices=DTYPES, default="", help="default: that of the files")
    p.add_argument("--backend", choices=EAGER, default="cpu", help="(%(default)s)")
    p.add_argument("--threads", type=int, default=0, metavar="N", help="per rank; 0: a share")
    p.add_argument("--batch", type=int, default=8, metavar="N", help="at once (%(default)s)")
    return p


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def main(argv: Sequence[str]) -> int:
    """Run the program; see ``parser``."""
    options = parser().parse_args(argv)
    where = rendezvous(os.environ)
    setup_logging(f"rank {where.rank}", main=where.rank == 0)
    if (options.data is None) == (options.test_file is None):
        raise ConfigError("give --data DATASET for the loss, or --test-file ROWS for answers")
    if options.test_file is not None and not options.template:
        raise ConfigError("--test-file needs --template, the words of the questions")
    for name in ("batch", "batches", "limit", "sequence_length", "threads"):
        least, value = int(name == "batch"), getattr(options, name)
        if value < least:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option}={value} is out of range; use {least} or more")
    if "" in options.stop:
        raise ConfigError("--stop is empty; give the text to stop at")
    given = open_model(options.model, options.tokenizer, options.base)
    tp, main_rank = where.world_size, where.rank == 0
    length = options.sequence_length or given.model.max_position_embeddings
    data = DataConfig(
        sequence_length=length,
        global_batch=options.batch,
        micro_batch=options.batch,
        packing=options.packing,
        labels=options.labels,
    )
    check(Config(given.model, ParallelConfig(tensor=tp, sequence=False), data=data), tp)
    feed, ends = None, set(given.model.eos_token_ids)
    asked: list[Prompt] = []
    references: list[str] = []
    if options.data is not None:
        feed = Samples(open_split(options.data, options.split, given), data, seed=0)
        if main_rank:
            logger.info("%s", feed)
    else:
        bos, fields = given.model.bos_token_id, dict(options.field)
        wording = PromptFormat(
            given.tokenizer, bos, options.template, fields, system=options.system
        )
        asked, references = read_test(options, given, wording)
        ends |= wording.ends
        check_prompts(given.model, [one.ids for one in asked], options.max_new_tokens)
    backend = choose(options.backend, where, options.threads)
    kv = given.model.kv_replicas(tp)
    with ExitStack() as stack:
        out = stack.enter_context(new_file(options.out)) if options.out and main_rank else None
        axis: Axis = stack.enter_context(backend.joined(Mesh(tp=tp, kv=kv), TIMEOUT_S)).tp
        model = given.build(axis, backend.device, options.dtype)
        if feed is not None:
            found = loss_of(model, feed, options.batches, bar=main_rank)
        else:
            speaker = Engine(
                model, given.tokenizer, Sampling(), options.max_new_tokens, options.stop, ends
            )
            found = answers_of(speaker, asked, references, options.batch, options.extract, out)
    if main_rank:
        print(json.dumps(found) if options.json else show(found))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
