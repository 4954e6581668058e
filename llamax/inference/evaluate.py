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
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from llamax.cli.generate import write_line
from llamax.data.dataset import open_dataset
from llamax.data.prepare.instruction_rows import read_sample
from llamax.data.prepare.tables import plan_tables, read_rows
from llamax.data.samples import Samples
from llamax.data.token_file import TokenFile
from llamax.inference.engine import Engine, LoadedModel
from llamax.inference.prompts import Prompt, PromptFormat
from llamax.inference.text_metrics import exact_match, rouge_l
from llamax.model.llama import Llama
from llamax.parallel.collectives import Solo
from llamax.runtime.errors import DataError
from llamax.runtime.units import perplexity


@torch.no_grad()
def loss_of(model: Llama, feed: Samples, batches: int = 0, bar: bool = False) -> dict[str, Any]:
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
        "samples": min(steps * feed.data.global_batch, len(feed)),
    }


def open_split(folder: Path, split: str, given: LoadedModel) -> TokenFile:
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
    options: argparse.Namespace, given: LoadedModel, wording: PromptFormat
) -> tuple[list[Prompt], list[str]]:
    """The prompts of a test file, and the right answers."""
    asked, answers = [], []
    for run in plan_tables([str(options.test_file)], limit=options.limit):
        for place, row in read_rows(run):
            try:
                found = read_sample(row, dict(options.field), options.system, wording.chat)
                if found is None:
                    raise DataError("has an empty answer; mend or remove it")
            except DataError as error:
                raise DataError(f"{place}: {error}") from None
            asked.append(wording.ask(row, place))
            answers.append(found.answer or found.messages[-1]["content"])
    return asked, answers


def answers_of(
    speaker: Engine,
    asked: Sequence[Prompt],
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
