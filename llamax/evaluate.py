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
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from llamax import log, program
from llamax.backends import EAGER, choose
from llamax.collectives import Axis, Solo
from llamax.config import Config, Data, Parallel
from llamax.data import rows
from llamax.data.dataset import open_dataset
from llamax.data.instruct import FIELDS, column, read
from llamax.data.templates import BUILT_IN
from llamax.data.tokens import TokenFile
from llamax.errors import ConfigError, DataError
from llamax.feed import Feed
from llamax.generate import TIMEOUT_S, new_file, write_line
from llamax.launch.env import rendezvous
from llamax.mesh import Mesh
from llamax.metrics import perplexity
from llamax.model import DTYPES, Llama
from llamax.prompts import Asked, Wording
from llamax.sampling import Sampling, check_prompts
from llamax.scores import exact_match, rouge_l
from llamax.speaker import Given, Speaker, open_given


@torch.no_grad()
def loss_of(model: Llama, feed: Feed, batches: int = 0, bar: bool = False) -> dict[str, Any]:
    """Mean loss in nats over the counted tokens of a split, of how many tokens and samples.

    ``batches``: only the first so many; 0: all.
    """
    device = model.tp.rank_index.device
    total, counted = 0.0, 0
    loader = feed.loader(Solo("data"), 0, shuffle=False)
    steps = min(loader.steps, batches or loader.steps)
    shown = tqdm(loader.epoch(), total=steps, disable=None if bar else True, desc="evaluating")
    for _, (batch,) in zip(range(steps), shown, strict=False):
        ids, labels, positions = (part.to(device) for part in batch[:3])
        documents = None if batch.documents is None else batch.documents.to(device)
        found, count = model.loss(ids, labels, positions, documents_BS=documents)
        total, counted = total + float(found), counted + int(count)
    if not counted:
        raise DataError(f"{feed.file.path}: no token of it counts; use --labels all")
    loss = total / counted
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "tokens": counted,
        "samples": min(steps * feed.data.global_batch, feed.samples),
    }


def open_split(folder: Path, split: str, given: Given) -> TokenFile:
    """The token file of a split; DataError where there is none, or of another tokenizer."""
    dataset = open_dataset(folder)
    dataset.check_vocabulary(given.model.vocab_size)
    own = dataset.fingerprint
    if own and own != given.tokenizer.fingerprint:
        raise DataError(
            f"{folder}: made with tokenizer {own[:12]}, but the model's is "
            f"{given.tokenizer.fingerprint[:12]}; prepare the data with that one"
        )
    path = folder / f"{split}.tokens"
    if not path.is_file():
        found = ", ".join(each.stem for each in sorted(folder.glob("*.tokens")))
        raise DataError(f"{folder}: has no split {split}; use --split {found}")
    return TokenFile(path)


def read_test(
    options: argparse.Namespace, given: Given, wording: Wording
) -> tuple[list[Asked], list[str]]:
    """The prompts of a test file, and the right answers."""
    asked, answers = [], []
    for run in rows.plan([str(options.test_file)], limit=options.limit):
        for place, row in rows.rows(run):
            try:
                found = read(row, dict(options.field), options.system, wording.chat)
                if found is None:
                    raise DataError("has an empty answer; mend or remove it")
            except DataError as error:
                raise DataError(f"{place}: {error}") from None
            asked.append(wording.ask(row, place))
            answers.append(found.answer or found.messages[-1]["content"])
    return asked, answers


def answers_of(
    speaker: Speaker,
    asked: Sequence[Asked],
    references: Sequence[str],
    batch: int,
    extract: re.Pattern[str] | None,
    out: IO[str] | None,
) -> dict[str, Any]:
    """Exact match and ROUGE-L of a model's answers to a test file."""
    right, alike = 0, 0.0
    for start in tqdm(range(0, len(asked), batch), disable=None, desc="answering"):
        some = asked[start : start + batch]
        texts, ids = [one.text for one in some], [one.ids for one in some]
        done = speaker.speak(texts, ids, start, lambda text: None)
        for one, completion, reference in zip(some, done, references[start:], strict=False):
            same = exact_match(completion.text, reference, extract)
            score = rouge_l(completion.text, reference)
            right, alike = right + same, alike + score
            if out:
                told = {"reference": reference, "exact_match": same, "rouge_l": score}
                write_line(out, {**one.row, **asdict(completion), **told})
    return {"rows": len(asked), "exact_match": right / len(asked), "rouge_l": alike / len(asked)}


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
    log.setup(f"rank {where.rank}", main=where.rank == 0)
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
    given = open_given(options.model, options.tokenizer, options.base)
    tp, main_rank = where.world_size, where.rank == 0
    length = options.sequence_length or given.model.max_position_embeddings
    data = Data(
        sequence_length=length,
        global_batch=options.batch,
        micro_batch=options.batch,
        packing=options.packing,
        labels=options.labels,
    )
    Config(given.model, Parallel(tensor=tp, sequence=False), data=data).check(tp)
    feed, ends = None, set(given.model.eos_token_ids)
    asked: list[Asked] = []
    references: list[str] = []
    if options.data is not None:
        feed = Feed(open_split(options.data, options.split, given), data, seed=0)
        if main_rank:
            log.logger.info("%s", feed)
    else:
        bos, fields = given.model.bos_token_id, dict(options.field)
        wording = Wording(given.tokenizer, bos, options.template, fields, system=options.system)
        asked, references = read_test(options, given, wording)
        ends |= wording.ends
        check_prompts(given.model, [one.ids for one in asked], options.max_new_tokens)
    backend = choose(options.backend, where, options.threads)
    kv = given.model.kv_replicas(tp)
    with ExitStack() as stack:
        out = stack.enter_context(new_file(options.out)) if options.out and main_rank else None
        axis: Axis = stack.enter_context(backend.joined(Mesh(tp=tp), TIMEOUT_S, kv)).tp
        model = given.build(axis, backend.device, options.dtype)
        if feed is not None:
            found = loss_of(model, feed, options.batches, bar=main_rank)
        else:
            speaker = Speaker(
                model, given.tokenizer, Sampling(), options.max_new_tokens, options.stop, ends
            )
            found = answers_of(speaker, asked, references, options.batch, options.extract, out)
    if main_rank:
        print(json.dumps(found) if options.json else show(found))
    return 0


if __name__ == "__main__":
    sys.exit(program.run(main))
