"""``generate`` and ``compare``: the answers of one model or of several to prompts.

::

    prompts ──PromptFormat──> ids ──Engine──> a token per prompt and step ──> text

On several ranks the model is cut over one tensor-parallel axis: each rank computes the same logits
and draws the same tokens; rank 0 writes and shows them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple

import torch

from llamax.backends import choose
from llamax.backends.base import INFERENCE, Backend
from llamax.checkpoint.peft import is_adapter
from llamax.config.choices import BACKENDS
from llamax.data.prepare.file_kinds import Row
from llamax.data.prepare.row_samples import check_fields
from llamax.inference.checks import check_computing, check_ranks, check_stops
from llamax.inference.engine import (
    Completion,
    Engine,
    LoadedModel,
    Show,
    begin_id,
    open_model,
    split_stops,
)
from llamax.inference.prompts import Prompt, PromptFormat, read_prompts
from llamax.inference.sampling import Sampling, check_prompts, sampling_of
from llamax.inference.static_decoding import StaticDecoder, cache_length, programs
from llamax.model.layout import transpose_weights
from llamax.model.llama import Llama
from llamax.model.placement import move_model
from llamax.parallel.mesh import Mesh
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.address import refuse_address
from llamax.runtime.errors import ConfigError, DataError
from llamax.runtime.logging import logger
from llamax.runtime.progress import Progress, reported

TIMEOUT_S = 600.0  # longest wait of ranks for each other
ALONE = Rendezvous()

OnCompletion = Callable[[int, int, Prompt, Completion], None]


@dataclass(frozen=True)
class GenerationSettings:
    """How prompts are formatted and continued.

    Raises ConfigError or DataError for a value out of range.
    """

    max_new_tokens: int = 100
    """Largest number of new tokens per prompt."""
    temperature: float | None = None
    """Divisor of the logits; 0 takes the most likely token; None: the model's, or 0.8."""
    top_k: int | None = None
    """Number of most likely tokens to draw among; 0: all; None: the model's, or all."""
    top_p: float | None = None
    """Probability of the tokens to draw among, above 0, at most 1; None: the model's, or 1."""
    seed: int = 0
    """Seed of the draws; prompt i draws with seed + i."""
    stop: Sequence[str] = ()
    """Texts before which an answer ends."""
    stop_ids: Sequence[int] = ()
    """Tokens at which an answer ends, besides the model's EOS."""
    bos: bool | None = None
    """Whether prompts begin with BOS, if there is one; None: as the tokenizer adds it."""
    template: str = ""
    """Template of the prompts: a built-in name, a file or a folder with one, "none" for plain text;
    empty: that of training, if the model's files hold it."""
    context: str = ""
    """Context of questions that have none; needs a template."""
    system: str | None = None
    """System prompt of questions that have none; None: that of training with its template."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Columns of the fields of rows, where they are not those of training or the usual names."""
    limit: int = 0
    """Only the first so many prompts; 0: all."""
    batch: int = 8
    """Number of prompts computed at once."""
    dtype: str = ""
    """Type of the weights, such as "bfloat16"; empty: that of the files, float16 only on GPUs."""
    backend: str = "cpu"
    """Backend: "cpu", "cuda", "neuron" or "xla"."""
    quantize: str = ""
    """Weights in 8 bits, "int8", on backend "cpu"; empty: in ``dtype``."""
    threads: int = 0
    """CPU threads per rank; 0: an equal share of the cores."""
    length: int = 0
    """Backend "xla": tokens of a prompt and its answer for which programs are compiled, then for
    all of ``batch``; 0: those of the longest, rounded up."""

    def __post_init__(self) -> None:
        check_computing(self.batch, self.threads, self.dtype, self.backend, BACKENDS, self.quantize)
        if self.length and self.backend != "xla":
            raise ConfigError(
                f"`length={self.length}` is of backend xla alone, and `backend={self.backend}` "
                "takes every length; leave it out"
            )
        for name, value in (("length", self.length), ("limit", self.limit)):
            if value < 0:
                raise ConfigError(f"`{name}={value}` is out of range; use 0 or more")
        check_stops(self.stop, self.stop_ids)
        check_fields(self.fields)
        self.sampling()

    def sampling(self, generation: Mapping[str, Any] = MappingProxyType({})) -> Sampling:
        """How the next token is drawn: as set here, or else as a generation_config.json says."""
        return sampling_of(generation, self.temperature, self.top_k, self.top_p, self.seed)


def silent(text: str) -> None:
    """Show nothing."""


def generate(
    model: str | Path,
    prompts: str | Sequence[str | Row] = (),
    settings: GenerationSettings = GenerationSettings(),
    *,
    prompts_file: str | Path | None = None,
    tokenizer: str | Path = "",
    base: str | Path = "",
    out: str | Path | None = None,
    rank: Rendezvous = ALONE,
    show: Show = silent,
    on_completion: OnCompletion | None = None,
) -> list[Completion]:
    """Continue prompts with a trained model.

    Args:
        model: Hugging Face folder, run, checkpoint or folder of adapters.
        prompts: Texts, or rows with the fields of a template.  Without any the model begins a text.
        settings: How prompts are formatted and continued.
        prompts_file: More prompts: one per line (which may come from a pipe), or a table of rows
            (.jsonl, .json, .csv, .tsv, .parquet).
        tokenizer: Tokenizer file or folder; by default the model's or that of its dataset.
        base: Base model of adapters, if it is not where they say.
        out: New JSONL file: the row of each prompt and its completion.
        rank: This process among those that share the model; by default it is alone.
        show: Called with the text of a single prompt, then with its answer piece by piece.
        on_completion: Called on rank 0 for each prompt when it is done, with its number from 1 and
            the number of all.

    Raises:
        ConfigError: For prompts that are too long, or ranks that do not divide the model.
        DataError: For prompts that cannot be read, or an ``out`` that exists.
        CheckpointError: For a model that is missing or damaged.
    """
    rows = read_prompts(prompts, prompts_file, settings.template)[: settings.limit or None]
    loaded = _load(Path(model), str(tokenizer), str(base), rank.world_size)
    prompted = format_prompts(loaded, rows, settings)
    with _engines([prompted], settings, rank, out) as (build, file):
        engine, main = build(0), rank.rank == 0
        alone = len(prompted.prompts) == 1
        done: list[Completion] = []
        for batch, completions in _batches(
            engine, prompted.prompts, settings.batch, show if main and alone else silent, main
        ):
            for prompt, completion in zip(batch, completions, strict=True):
                done.append(completion)
                if main and on_completion:
                    on_completion(len(done), len(rows), prompt, completion)
                if file:
                    write_line(file, {**prompt.row, **asdict(completion)})
        logger.info("%s", engine.speed)
    return done


def precompile(
    model: str | Path,
    settings: GenerationSettings,
    *,
    tokenizer: str | Path = "",
    base: str | Path = "",
    rank: Rendezvous = ALONE,
) -> int:
    """Compile the programs of ``settings`` without generating; returns their number.

    ``settings`` have backend "xla" and a ``length``; for the rest and the errors see ``generate``.
    """
    if not settings.length:
        raise ConfigError(
            "`precompile` needs `backend` xla and `length`, the tokens to compile for"
        )
    rows, settings = read_prompts((), None, settings.template), replace(settings, max_new_tokens=1)
    loaded = _load(Path(model), str(tokenizer), str(base), rank.world_size)
    prompted = format_prompts(loaded, rows, settings)
    with _engines([prompted], settings, rank, None) as (build, _):
        decoder = build(0).decoder
        assert decoder is not None
        decoder.run_all()
    return len(programs(settings.length))


class Comparison(NamedTuple):
    """A prompt and the answers of the models to it, in their order."""

    prompt: Prompt
    answers: tuple[Completion, ...]

    @property
    def base(self) -> Completion:
        """The answer of the first model."""
        return self.answers[0]

    @property
    def tuned(self) -> Completion:
        """The answer of the last model."""
        return self.answers[-1]


def compare(
    models: Sequence[str | Path],
    prompts: str | Sequence[str | Row] = (),
    settings: GenerationSettings = GenerationSettings(),
    *,
    prompts_file: str | Path | None = None,
    tokenizer: str | Path = "",
    base: str | Path = "",
    out: str | Path | None = None,
    rank: Rendezvous = ALONE,
) -> list[Comparison]:
    """The answers of several models, such as a base and its tuned model, to the same prompts.

    ``out`` gets a line per prompt with the fields "base" and "tuned"; of more than two models
    "base", "tuned1", "tuned2" ...  Only adapters take ``base``, if there are any.  For the other
    parameters and the errors see ``generate``.
    """
    if len(models) < 2:
        raise ConfigError(f"`compare` takes two models or more; found {len(models)}")
    rows = read_prompts(prompts, prompts_file, settings.template)[: settings.limit or None]
    paths = [Path(model) for model in models]
    adapters = [is_adapter(path) for path in paths]
    bases = [str(base) if is_one or not any(adapters) else "" for is_one in adapters]
    loaded = [
        _load(path, str(tokenizer), model_base, rank.world_size)
        for path, model_base in zip(paths, bases, strict=True)
    ]
    record = next((model.prompt for model in reversed(loaded) if model.prompt), None)
    prompted = [format_prompts(replace(model, prompt=record), rows, settings) for model in loaded]
    with _engines(prompted, settings, rank, out) as (build, file):
        answers: list[list[Completion]] = []
        for number, model in enumerate(prompted):
            engine = build(number)
            batches = _batches(engine, model.prompts, settings.batch, silent, rank.rank == 0)
            answers.append([completion for _, done in batches for completion in done])
            logger.info("%s", engine.speed)
            del engine  # one model at a time is in memory
        together = zip(prompted[0].prompts, zip(*answers, strict=True), strict=True)
        found = [Comparison(prompt, completions) for prompt, completions in together]
        count = len(models)
        names = ["base", *("tuned" if count == 2 else f"tuned{i}" for i in range(1, count))]
        for each in found if file else ():
            assert file is not None
            completions = dict(zip(names, map(asdict, each.answers), strict=True))
            write_line(file, {**each.prompt.row, **completions})
    return found


class PromptedModel(NamedTuple):
    """A model in files, its prompts, and the tokens that end its answers."""

    model: LoadedModel
    prompts: list[Prompt]
    stop_ids: set[int]

    def engine(self, model: Llama, settings: GenerationSettings) -> Engine:
        """The engine that continues the prompts, with the model as it was built."""
        return Engine(
            model,
            self.model.tokenizer,
            settings.sampling(self.model.generation),
            settings.max_new_tokens,
            settings.stop,
            self.stop_ids,
        )


def _load(path: Path, tokenizer: str, base: str, ranks: int) -> LoadedModel:
    """Open a model's files; raises what ``generate`` raises."""
    loaded = open_model(path, tokenizer, base)
    check_ranks(loaded.model, ranks)
    return loaded


def format_prompts(
    loaded: LoadedModel, rows: Sequence[tuple[str, Row]], settings: GenerationSettings
) -> PromptedModel:
    """Format prompts for a model; raises what ``generate`` raises for them."""
    asked = any(row.get("prompt") != "" for _, row in rows)  # not to begin a text from nothing
    formatter = PromptFormat(
        loaded.tokenizer,
        begin_id(loaded, settings.bos),
        settings.template,
        settings.fields,
        settings.context,
        settings.system,
        loaded.prompt if asked else None,
    )
    prompts = [formatter.prompt(row, place) for place, row in rows]
    check_prompts(loaded.model, [prompt.ids for prompt in prompts], settings.max_new_tokens)
    split_stops(loaded.tokenizer, settings.stop)
    return PromptedModel(loaded, prompts, {*loaded.ends, *formatter.stop_ids, *settings.stop_ids})


@contextmanager
def _engines(
    models: Sequence[PromptedModel],
    settings: GenerationSettings,
    rank: Rendezvous,
    out: str | Path | None,
) -> Iterator[tuple[Callable[[int], Engine], IO[str] | None]]:
    """A function that builds a model's engine, and the file ``out``, while ranks are joined."""
    ranks = rank.world_size
    kv = max(1, ranks // min(prompted.model.model.num_key_value_heads for prompted in models))
    backend = choose(settings.backend, rank, settings.threads, words=INFERENCE)
    home = torch.device("cpu") if backend.traces else backend.device
    with ExitStack() as stack:
        file = None
        if out is not None and rank.rank == 0:
            file = stack.enter_context(new_file(Path(out)))
        axes = stack.enter_context(backend.joined(Mesh(tp=ranks, kv=kv), TIMEOUT_S))

        def build(number: int) -> Engine:
            prompted = models[number]
            with reported("loading the model", show=rank.rank == 0):
                model = prompted.model.build(
                    axes.tp, home, settings.dtype, quantize=settings.quantize
                )
            engine = prompted.engine(model, settings)
            if backend.traces:
                move_model(model, backend.device)
                engine.decoder = static_decoder(engine, prompted.prompts, settings, backend)
            else:
                transpose_weights(model)
            return engine

        yield build, file


def static_decoder(
    engine: Engine, prompts: Sequence[Prompt], settings: GenerationSettings, backend: Backend
) -> StaticDecoder:
    """The decoder of all prompts of a model on a device that compiles programs."""
    ids = [prompt.ids for prompt in prompts]
    length = cache_length(engine.model.config, ids, settings.max_new_tokens, settings.length)
    return StaticDecoder(
        engine.model,
        backend,
        settings.batch if settings.length else min(settings.batch, len(prompts)),
        length,
        engine.sampling.temperature == 0,
        engine.tokenizer.vocab_size,
    )


def _batches(
    engine: Engine, prompts: Sequence[Prompt], batch: int, show: Show, main: bool
) -> Iterator[tuple[Sequence[Prompt], list[Completion]]]:
    """Batches of prompts and their completions, each when it is done.

    ``main``: whether this rank shows the progress of several.
    """
    several = len(prompts) > 1
    with Progress("answering", len(prompts), "prompt", show=main and several) as progress:
        for start in range(0, len(prompts), batch):
            some = prompts[start : start + batch]
            show(some[0].text)
            yield some, engine.complete(some, start, show)
            progress.update(len(some))


def new_file(path: Path) -> IO[str]:
    """Open a file that does not exist yet for writing; DataError if it exists or cannot be made."""
    refuse_address(path)
    try:
        return path.open("x", encoding="utf-8", errors="backslashreplace")
    except FileExistsError:
        raise DataError(f"{path} exists already; remove it or choose another `out`") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); check `out`") from None


def write_line(file: IO[str], value: Mapping[str, object]) -> None:
    """Write one line of JSON; values of other types, such as dates, become text."""
    file.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
