"""``evaluate``: the loss of a model on a dataset, or the scores of its answers to a test file.

::

    data       packed dataset ──> summed loss, counted tokens ──> loss, perplexity
    test_file  rows ──template──> prompts ──> answers ──> exact match, ROUGE-L

The loss is the mean over all tokens that count: of instruction data those of answers alone.  On
several ranks the model is cut over one tensor-parallel axis.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Literal

import torch

from llamax.backends import choose
from llamax.backends.base import INFERENCE
from llamax.config.schema import DataConfig
from llamax.data.dataset import Mixture, open_dataset
from llamax.data.prepare.row_samples import EmptyAnswer, check_fields, read_sample
from llamax.data.prepare.tables import plan_tables, read_rows
from llamax.data.samples import Samples
from llamax.data.stream import Stream
from llamax.data.token_file import TokenFile
from llamax.inference.checks import check_computing, check_ranks, check_stops
from llamax.inference.engine import Engine, LoadedModel, begin_id, open_model, split_stops
from llamax.inference.generate import (
    ALONE,
    TIMEOUT_S,
    new_file,
    silent,
    write_line,
)
from llamax.inference.prompts import PLAIN, Prompt, PromptFormat
from llamax.inference.sampling import Sampling, check_finite, check_prompts
from llamax.inference.text_metrics import exact_match, rouge_l
from llamax.model.layout import transpose_weights
from llamax.model.llama import Llama
from llamax.parallel.collectives import Axis, Solo
from llamax.parallel.mesh import Mesh
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import ConfigError, DataError
from llamax.runtime.logging import logger
from llamax.runtime.progress import reported, tracked
from llamax.runtime.units import perplexity


def evaluate(
    model: str | Path,
    *,
    data: str | Path | None = None,
    split: str = "validation",
    sequence_length: int = 0,
    packing: Literal["auto", "best-fit", "concat", "padded"] = "auto",
    labels: Literal["answers", "all"] = "answers",
    batches: int = 0,
    test_file: str | Path | None = None,
    template: str = "",
    system: str | None = None,
    fields: Mapping[str, str] = MappingProxyType({}),
    limit: int = 0,
    max_new_tokens: int = 256,
    stop: Sequence[str] = (),
    bos: bool | None = None,
    extract: str | re.Pattern[str] | None = None,
    out: str | Path | None = None,
    tokenizer: str | Path = "",
    base: str | Path = "",
    dtype: str = "",
    backend: str = "cpu",
    threads: int = 0,
    quantize: str = "",
    batch: int = 8,
    rank: Rendezvous = ALONE,
) -> dict[str, Any]:
    """Evaluate a model: with ``data`` its loss, with ``test_file`` its answers.

    Args:
        model: Hugging Face folder, run, checkpoint or folder of adapters.
        data: Dataset folder that ``prepare`` made, or the prefix of a Megatron dataset.
        split: Split of the dataset; a Megatron prefix is all "train".
        sequence_length: Tokens per sample; 0: as the run or checkpoint ``model`` trained, else the
            model's context.
        packing: How documents are put into samples; see ``data.packing``.
        labels: Whether all tokens count or, of instruction data, those of answers.
        batches: Number of batches to evaluate, from the first; 0: all.
        test_file: File of rows of questions and answers; needs a template.
        template: Template of the questions; by default that of training.
        system: System prompt of rows that have none; by default that of training.
        fields: Columns of the fields of rows, where they are not those of training or the usual.
        limit: Number of rows to answer, from the first; 0: all.
        max_new_tokens: Largest number of tokens of an answer.
        stop: Texts before which an answer ends.
        bos: Whether prompts begin with BOS, if there is one; by default as the tokenizer adds it.
        extract: Regular expression: only its last match counts for the exact match.
        out: New JSONL file: each row with its answer and scores.
        tokenizer: Tokenizer file or folder; by default the model's or that of its dataset.
        base: Base model of adapters, if it is not where they say.
        dtype: Type of the weights, by default that of the files; float16 files are
            loaded as float16 on GPUs and as float32 elsewhere.
        backend: "cpu", "cuda" or "neuron".
        threads: CPU threads per rank; 0: an equal share of the cores.
        quantize: "int8" for linear layers in 8 bits, on backend "cpu".
        batch: Number of samples or prompts computed at once.
        rank: This process among those that share the model; by default it is alone.

    Returns:
        With ``data``: loss (nats per token), perplexity, tokens, samples.  With ``test_file``:
        rows, exact_match (share of rows), rouge_l (mean, 0 to 1).

    Raises:
        ConfigError: For a parameter out of range, or ranks that do not divide the model.
        DataError: For data or rows that cannot be used, or an ``out`` that exists.
        CheckpointError: For a model that is missing or damaged.
    """
    if (data is None) == (test_file is None):
        raise ConfigError("give `data` DATASET for the loss, or `test_file` ROWS for answers")
    for name, value in (
        ("batches", batches),
        ("limit", limit),
        ("sequence_length", sequence_length),
    ):
        if value < 0:
            raise ConfigError(f"`{name}={value}` is out of range; use 0 or more")
    check_computing(batch, threads, dtype, backend, quantize=quantize)
    check_stops(stop)
    check_fields(fields)
    pattern = _pattern(extract)
    loaded = open_model(Path(model), str(tokenizer), str(base))
    split_stops(loaded.tokenizer, stop)
    ranks, main = rank.world_size, rank.rank == 0
    check_ranks(loaded.model, ranks)
    longest = loaded.model.max_position_embeddings
    if sequence_length > longest:
        raise ConfigError(
            f"`sequence_length={sequence_length}` is beyond max_position_embeddings={longest} of "
            "the model; use that or less"
        )
    data_config = DataConfig(
        sequence_length=sequence_length or loaded.sequence_length or longest,
        global_batch=batch,
        micro_batch=batch,
        packing=packing,
        labels=labels,
    )
    samples, prompts, references = None, list[Prompt](), list[str]()
    stop_ids = set(loaded.ends)
    formatted = template or loaded.prompt
    if test_file is not None and (not formatted or template == PLAIN):
        raise ConfigError("`test_file` needs `template`, the format of the questions")
    if data is not None:
        samples = Samples(open_split(Path(data), split, loaded), data_config, seed=0)
        rows = min(batch, len(samples))  # a batch that is not full is padded
        samples.data = replace(data_config, global_batch=rows, micro_batch=rows)
        samples.check_labels(batches, "`batches`", "`labels=all`")
        if main:
            logger.info("%s", samples)
    else:
        formatter = PromptFormat(
            loaded.tokenizer,
            begin_id(loaded, bos),
            template,
            fields,
            system=system,
            record=loaded.prompt,
        )
        prompts, references = read_test(str(test_file), formatter, limit)
        stop_ids |= formatter.stop_ids
        check_prompts(loaded.model, [prompt.ids for prompt in prompts], max_new_tokens)
    opened = choose(backend, rank, threads, words=INFERENCE)
    with ExitStack() as stack:
        file = stack.enter_context(new_file(Path(out))) if out is not None and main else None
        kv = loaded.model.kv_replicas(ranks)
        axis: Axis = stack.enter_context(opened.joined(Mesh(tp=ranks, kv=kv), TIMEOUT_S)).tp
        with reported("loading the model", show=main):
            llama = loaded.build(axis, opened.device, dtype, quantize=quantize)
        if samples is not None:
            return loss_of(llama, samples, batches, bar=main)
        transpose_weights(llama)
        engine = Engine(llama, loaded.tokenizer, Sampling(), max_new_tokens, stop, stop_ids)
        return score_answers(engine, prompts, references, batch, pattern, file, bar=main)


def _pattern(extract: str | re.Pattern[str] | None) -> re.Pattern[str] | None:
    """A compiled regular expression; ConfigError if it is not one."""
    try:
        return None if extract is None else re.compile(extract)
    except re.error as error:
        raise ConfigError(f"`extract`: {extract!r} is not a regular expression: {error}") from None


@torch.no_grad()
def loss_of(model: Llama, samples: Samples, batches: int = 0, bar: bool = False) -> dict[str, Any]:
    """Mean loss of a model in nats per counted token, with the numbers of tokens and samples.

    ``batches``: number of batches, from the first; 0: all.  Some token of them counts
    (``Samples.check_labels``).  ``bar``: show a progress bar.  Raises CheckpointError for a loss
    that is not finite.
    """
    device = model.tp.rank_index.device
    total, counted = 0.0, 0
    loader = samples.loader(Solo("data"), 0, shuffle=False)
    steps = min(loader.steps, batches or loader.steps)
    shown = tracked(loader.epoch(), "evaluating", steps, "batch", show=bar)
    for _, (batch,) in zip(range(steps), shown, strict=False):
        ids, labels, positions = (part.to(device) for part in batch[:3])
        documents = None if batch.documents is None else batch.documents.to(device)
        loss_sum, count = model.loss(ids, labels, positions, documents_BS=documents)
        check_finite(bool(loss_sum.isfinite()))
        total, counted = total + float(loss_sum), counted + int(count)
    loss = total / counted
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "tokens": counted,
        "samples": min(steps * samples.data.global_batch, len(samples)),
    }


def open_split(folder: Path, split: str, model: LoadedModel) -> Stream:
    """The tokens of a split; DataError if there is none, or if another tokenizer made it."""
    dataset = open_dataset(folder, vocab_size=model.model.vocab_size)
    fingerprint = dataset.fingerprint
    if fingerprint and fingerprint != model.tokenizer.fingerprint:
        raise DataError(
            f"{folder}: made with tokenizer {fingerprint[:12]}, but the model's is "
            f"{model.tokenizer.fingerprint[:12]}; prepare the data with that one"
        )
    dataset.check_vocabulary(model.model.vocab_size)
    splits = {"train": dataset.train, "validation": dataset.validation}
    found = splits.get(split)
    if isinstance(found, Mixture):
        raise DataError(f"{folder}: is a blend; evaluate its datasets one by one")
    if found is not None:
        return found
    path = folder / f"{split}.tokens"
    if not path.is_file():
        names = [name for name, part in splits.items() if part is not None]
        names += [file.stem for file in sorted(folder.glob("*.tokens")) if file.stem not in names]
        raise DataError(f"{folder}: has no split {split}; use `split` {', '.join(names)}")
    return TokenFile(path)


def read_test(path: str, formatter: PromptFormat, limit: int = 0) -> tuple[list[Prompt], list[str]]:
    """The prompts of a test file, and the right answers; DataError names a row without one."""
    prompts, answers = [], []
    for rows in plan_tables([path], limit=limit):
        for place, row in read_rows(rows):
            try:
                sample = read_sample(
                    row, formatter.fields_of(row), formatter.system, formatter.template
                )
            except EmptyAnswer as error:
                raise DataError(f"{place}: {error}; correct or remove it") from None
            except DataError as error:
                raise DataError(f"{place}: {error}") from None
            prompts.append(formatter.prompt(row, place))
            answers.append(sample.answer or sample.messages[-1].get("content") or "")
    return prompts, answers


def score_answers(
    engine: Engine,
    prompts: Sequence[Prompt],
    references: Sequence[str],
    batch: int,
    extract: re.Pattern[str] | None,
    file: IO[str] | None,
    bar: bool = False,
) -> dict[str, Any]:
    """Exact match and ROUGE-L of a model's answers; each answer with its scores into ``file``.

    ``bar``: show a progress bar.
    """
    exact, overlap = 0, 0.0
    starts = range(0, len(prompts), batch)
    for start in tracked(starts, "answering", len(starts), "batch", show=bar):
        some = prompts[start : start + batch]
        done = engine.complete(some, start, silent)
        for prompt, completion, reference in zip(some, done, references[start:], strict=False):
            same = exact_match(completion.text, reference, extract)
            score = rouge_l(completion.text, reference)
            exact, overlap = exact + same, overlap + score
            if file:
                scores = {"reference": reference, "exact_match": same, "rouge_l": score}
                write_line(file, {**prompt.row, **asdict(completion), **scores})
    rows = len(prompts)
    return {"rows": rows, "exact_match": exact / rows, "rouge_l": overlap / rows}
