"""A model that continues prompts: opened from any kind of folder, built on a rank, run in batches.

::

    Hugging Face folder  ─┐                              ┌─ Llama on this rank ─┐
    run, checkpoint      ─┼─ open_model ─> LoadedModel ──┤                      ├──> Engine ──> text
    adapters and a base  ─┘                              └─ tokenizer ──────────┘

Adapters stay beside their base, unmerged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llamax.checkpoint.adapter_folders import adapter_folder, holds_adapters
from llamax.checkpoint.build_model import default_dtype, load_int8, load_tuned
from llamax.checkpoint.hf_folder import has_tokenizer, open_source
from llamax.checkpoint.load import load_weights
from llamax.checkpoint.peft import (
    AdapterInfo,
    adapter_info,
    find_base_folder,
    open_adapter,
)
from llamax.checkpoint.places import cut_from, dataset_of
from llamax.checkpoint.plain_llama import MODEL_CLASS
from llamax.checkpoint.prompt_record import prompt_of
from llamax.checkpoint.reader import Checkpoint
from llamax.checkpoint.source import Source
from llamax.config.load import config_in
from llamax.config.model import ModelConfig
from llamax.data.chat.record import PromptRecord
from llamax.data.megatron import is_prefix
from llamax.data.tokenizer.streaming import Detokenizer
from llamax.data.tokenizer.tokenizer import Tokenizer, begin_of_prompts, load_tokenizer
from llamax.inference.prompts import Prompt
from llamax.inference.sampling import Sampling, generate_tokens
from llamax.inference.static_decoding import StaticDecoder, static_tokens
from llamax.model import int8
from llamax.model.llama import DTYPES, Llama
from llamax.parallel.collectives import Axis
from llamax.runtime.errors import ConfigError, DataError
from llamax.runtime.files import read_input
from llamax.runtime.hub import local_folder
from llamax.runtime.hub_files import CHAT_TEMPLATE, MODEL, TOKENIZER
from llamax.runtime.logging import logger
from llamax.runtime.units import count, show_bytes

Show = Callable[[str], None]


@dataclass(frozen=True)
class LoadedModel:
    """A model in files: its weights, its tokenizer and, perhaps, a folder of adapters."""

    source: Source
    model: ModelConfig
    tokenizer: Tokenizer
    adapter: Path | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    """Content of generation_config.json."""
    prompt: PromptRecord | None = None
    """How training made text of rows; None if it did not, or if no file says so."""
    sequence_length: int = 0
    """Tokens of a sample in training; 0 if no file says so."""

    @property
    def ends(self) -> set[int]:
        """The tokens that end an answer."""
        return {*self.model.eos_token_ids, *(self.prompt.turn_ends if self.prompt else ())}

    def dtype(self, device: torch.device, chosen: str = "") -> torch.dtype:
        """The type of the weights: ``chosen``, or ``default_dtype`` of the files."""
        return DTYPES[chosen] if chosen else default_dtype(self.source, device)

    def build(
        self,
        tp: Axis,
        device: torch.device,
        dtype: str = "",
        model_class: type[Llama] = Llama,
        quantize: str = "",
    ) -> Llama:
        """Build the model on this tensor-parallel rank; ``dtype`` by default ``default_dtype``.

        ``model_class``: the subclass of Llama that was trained.  Warns if another one was.
        ``quantize``: "int8" for linear layers in 8 bits.
        """
        if quantize and self.adapter is not None:
            raise ConfigError(
                f"`quantize={quantize}` is for a whole model, and {self.adapter} holds adapters; "
                "merge them with llamax merge and take the result"
            )
        trained_as = self.source.state.get(MODEL_CLASS)
        if trained_as and model_class is Llama:
            logger.warning(
                "%s was trained as %s and is loaded as a plain Llama; give `model_class`",
                self.source.folder,
                trained_as,
            )
        if self.adapter is not None:
            if model_class is not Llama:
                raise ConfigError(f"{self.adapter} holds adapters, which take no `model_class`")
            kind = DTYPES[dtype] if dtype else None
            return load_tuned(self.adapter, self.source.folder, tp, device, kind)
        kind = self.dtype(device, dtype)
        in_parts = quantize and model_class is Llama
        model = model_class(self.model, tp, dtype=kind, device="meta" if in_parts else device)
        dense = int8.num_bytes(model)
        if in_parts:
            load_int8(model, self.source, device)
        else:
            if model_class is not Llama:
                model.to(device, kind)
            load_weights(self.source, model.sharded_parameters(), convert=True)
            if quantize:
                int8.quantize(model)
        if quantize:
            size = show_bytes(int8.num_bytes(model))
            logger.info("weights in %s: %s instead of %s", quantize, size, show_bytes(dense))
        return model


def open_model(path: Path, tokenizer: str = "", base: str = "") -> LoadedModel:
    """Open the model in a Hugging Face folder or repository, a run, a checkpoint or adapters.

    ``tokenizer``: tokenizer to use instead of the model's.  ``base``: folder of an adapter's base,
    if it is not where the adapter says.  Raises CheckpointError or DataError if a part is missing
    or does not fit.
    """
    path = local_folder(path, MODEL)
    adapter: Source | None = None
    info: AdapterInfo | None
    if holds_adapters(adapter_folder(path)):
        adapter, info = open_adapter(path)
    else:
        source = open_source(path)
        info = adapter_info(source)
        adapter = source if info is not None else None
    if adapter is not None and info is not None:
        source = open_source(base or find_base_folder(adapter.folder, info))
    elif base:
        raise DataError(f"{path} is a whole model and needs no `base`; leave it out")
    model = ModelConfig.from_hub(source.model)
    trained = source
    if adapter is not None and (isinstance(adapter, Checkpoint) or has_tokenizer(adapter.folder)):
        trained = adapter
    prompt = None if adapter is None else prompt_of(adapter)
    run = config_in(trained.folder) if isinstance(trained, Checkpoint) else None
    return LoadedModel(
        source,
        model,
        tokenizer_of(trained, model.vocab_size, tokenizer),
        None if adapter is None else path,
        source.generation,
        prompt or prompt_of(source),
        run.data.sequence_length if run else 0,
    )


def tokenizer_of(source: Source, vocab_size: int, chosen: str = "") -> Tokenizer:
    """The tokenizer ``chosen``, or that of the model's folder or of the dataset it trained on.

    Raises DataError if there is none, if the model was trained with another one, and if it has more
    ids than the model.
    """
    place: Path | None = local_folder(chosen, TOKENIZER) if chosen else source.folder
    if isinstance(source, Checkpoint) and not chosen:
        place = dataset_of(source.folder, source.state) or cut_from(source.folder, source.state)
    if place is None:
        raise DataError(
            f"{source.folder} does not say what it was trained on; use `tokenizer` PATH"
        )
    if not chosen and is_prefix(place):
        # llamax prepare keeps the tokenizer in the folder of a dataset.
        if not (place.parent / "dataset.json").is_file():
            raise DataError(
                f"{source.folder} was trained on Megatron's files {place}, which do not name their "
                "tokenizer; use `tokenizer` PATH"
            )
        place = place.parent
    if not (chosen or place.is_dir()):
        raise DataError(
            f"{source.folder} was trained on the dataset {place}, which is not here, so its "
            "tokenizer cannot be read; use `tokenizer` PATH"
        )
    tokenizer = load_tokenizer(place)
    expected = source.state.get("tokenizer") if isinstance(source, Checkpoint) else None
    if expected and not chosen and expected != tokenizer.fingerprint:
        raise DataError(
            f"{tokenizer.path} is not the tokenizer that {source.folder} was trained with: its "
            f"sha256 is {tokenizer.fingerprint[:12]}, not {expected[:12]}; use `tokenizer` PATH"
        )
    if tokenizer.base_size > vocab_size:
        raise DataError(
            f"{tokenizer.path} has {tokenizer.base_size} ids but the model {vocab_size}; "
            "use `tokenizer` with the model's own"
        )
    return tokenizer


def chat_template(loaded: LoadedModel) -> str:
    """The folder with the chat template of a model's files; empty if there is none."""
    folders = (loaded.adapter, loaded.source.folder, loaded.tokenizer.path.parent)
    for folder in filter(None, folders):
        config = folder / "tokenizer_config.json"
        if (folder / CHAT_TEMPLATE).is_file() or (
            config.is_file() and b'"chat_template"' in read_input(config)
        ):
            return str(folder)
    return ""


def begin_id(loaded: LoadedModel, bos: bool | None) -> int | None:
    """The token with which a prompt begins, or None.

    ``bos``: whether there is one, if tokenizer or model have a BOS; None: as the tokenizer does.
    """
    return begin_of_prompts(loaded.tokenizer, loaded.model.bos_token_id, bos)


def split_stops(tokenizer: Tokenizer, stops: Sequence[str]) -> tuple[list[str], set[int]]:
    """The stop texts, and the ids of those that are special tokens, which texts do not contain.

    Raises ConfigError for a stop text with a special token inside.
    """
    texts = [stop for stop in stops if stop not in tokenizer.special]
    for stop in texts:
        for name, number in tokenizer.special.items():
            if name in stop:
                raise ConfigError(
                    f"`stop={stop}` has the special token {name} inside, and answers are text "
                    f"without special tokens; use `stop={name}` (id {number}), or the text alone"
                )
    return texts, {tokenizer.special[stop] for stop in stops if stop in tokenizer.special}


@dataclass
class Completion:
    """The continuation of a prompt; ``ended`` is "stop" or "length"."""

    prompt: str
    prompt_tokens: int
    new_tokens: int = 0
    text: str = ""
    ended: str = "length"


@dataclass
class Speed:
    """Tokens and seconds of prefill (up to the first new token) and of decoding after it."""

    prompt_tokens: int = 0
    prefill_s: float = 0.0
    new_tokens: int = 0
    decode_s: float = 0.0

    def __str__(self) -> str:
        text = f"{count(self.prompt_tokens, 'prompt token')} in {self.prefill_s:.2f} s"
        if not self.new_tokens:
            return text
        rate = self.new_tokens / max(self.decode_s, 1e-9)
        return f"{text}, {self.new_tokens} more in {self.decode_s:.2f} s: {rate:.1f} tokens/s"


@dataclass
class Engine:
    """Continues prompts with one model; ``speed`` is summed over all of them.

    An answer ends before a text in ``stops`` and at a token in ``stop_ids``.  ``decoder``: that of
    a device which compiles programs.  Raises ConfigError for a stop text with a special token
    inside.
    """

    model: Llama
    tokenizer: Tokenizer
    sampling: Sampling
    max_new_tokens: int = 100
    stops: Sequence[str] = ()
    stop_ids: Collection[int] = ()
    decoder: StaticDecoder | None = None
    speed: Speed = field(default_factory=Speed)

    def __post_init__(self) -> None:
        self.stops, named = split_stops(self.tokenizer, self.stops)
        self.stop_ids = {*self.stop_ids, *named}

    def complete(self, prompts: Sequence[Prompt], number: int, show: Show) -> list[Completion]:
        """The completions of a batch of prompts.

        ``number`` is the position of the first among all prompts, from 0: it shifts the seed.
        ``show`` is called with the text of the first completion as it is generated, in whole
        characters.
        """
        done = [Completion(prompt.text, len(prompt.ids)) for prompt in prompts]
        for text in self.stream(prompts, done, number):
            show(text)
        return done

    def stream(
        self, prompts: Sequence[Prompt], done: Sequence[Completion], number: int = 0
    ) -> Iterator[str]:
        """Fill the completions of a batch while yielding the text of the first, as ``complete``."""
        ids = [prompt.ids for prompt in prompts]
        writers = [Detokenizer(self.tokenizer.decode, each, self.stops) for each in ids]
        steps = self._steps(ids, replace(self.sampling, seed=self.sampling.seed + number))
        began = first = time.perf_counter()
        for step, tokens in enumerate(steps):
            first = first if step else time.perf_counter()
            for completion, writer, token in zip(done, writers, tokens, strict=True):
                if token is None or completion.ended == "stop":
                    continue
                stop = token in self.stop_ids
                text = writer.finish() if stop else writer.feed(token)
                completion.new_tokens += 1
                completion.ended = "stop" if stop or writer.stopped else "length"
                completion.text += text
                if completion is done[0] and text:
                    yield text
            if all(completion.ended == "stop" for completion in done):
                break
        for completion, writer in zip(done, writers, strict=True):
            text = writer.finish()
            completion.text += text
            if completion is done[0] and text:
                yield text
        self.speed.prompt_tokens += sum(map(len, ids))
        self.speed.prefill_s += first - began
        self.speed.new_tokens += sum(completion.new_tokens - 1 for completion in done)
        self.speed.decode_s += time.perf_counter() - first

    def _steps(
        self, ids: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[list[int | None]]:
        """The next token of each prompt, step by step."""
        if self.decoder is not None:
            return static_tokens(self.decoder, ids, self.max_new_tokens, sampling, self.stop_ids)
        return generate_tokens(
            self.model,
            ids,
            max_new_tokens=self.max_new_tokens,
            sampling=sampling,
            stop_ids=self.stop_ids,
            vocab_size=self.tokenizer.vocab_size,
        )
