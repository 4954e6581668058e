"""``llamax.load``: a trained model in this process, for programs and notebooks.

::

    model = llamax.load("runs/demo")          a run, a step, a Hugging Face or an adapter folder
    model.generate("def ", max_new_tokens=50) the text that `llamax generate` prints
    model.model, model.tokenizer              the torch module and the tokenizer
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamax.backends import choose
from llamax.backends.base import Words
from llamax.config.choices import EAGER_BACKENDS
from llamax.data.prepare.file_kinds import Row
from llamax.inference.checks import check_computing
from llamax.inference.engine import (
    Completion,
    Engine,
    LoadedModel,
    begin_id,
    chat_template,
    open_model,
)
from llamax.inference.generate import GenerationSettings, PromptedModel, format_prompts, silent
from llamax.inference.prompts import check_encodable, read_prompts
from llamax.model.llama import Llama
from llamax.parallel.collectives import Solo
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import BackendError, ConfigError, DataError
from llamax.runtime.units import show_number

Messages = Sequence[Mapping[str, Any]]
"""A conversation: [{"role": "user", "content": "..."}, ...]."""


class LanguageModel:
    """A model that ``llamax.load`` has opened.

    ``model``: the torch module, in evaluation of one process; ``tokenizer`` and ``config``: what
    belongs to it; ``folder``: where its weights are.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        model: Llama,
        path: Path,
        backend: str,
        place: Rendezvous,
        threads: int,
    ) -> None:
        self.model, self.tokenizer, self.config = model, loaded.tokenizer, loaded.model
        self.folder: Path = loaded.adapter or loaded.source.folder
        self._loaded, self._path = loaded, path
        self._backend, self._place, self._threads = backend, place, threads

    def __repr__(self) -> str:
        weight = next(self.model.parameters())
        return (
            f"<llamax model {self._path}: {show_number(self.config.num_parameters())} parameters, "
            f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}>"
        )

    def generate(
        self,
        prompt: str | Row | Messages | Sequence[str | Row | Messages] = "",
        *,
        max_new_tokens: int = 100,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        stream: bool = False,
        template: str = "",
        context: str = "",
        system: str = "",
        bos: bool | None = None,
        batch: int = 8,
    ) -> Any:
        """Continue a prompt: the new text, without the prompt.

        Args:
            prompt: A text; or a conversation, a list of {"role", "content"}; or a row with the
                fields of a template; or a list of any of these.
            max_new_tokens: Largest number of new tokens.
            temperature: Divisor of the logits; 0 takes the most likely token; None: the model's,
                or 0.8.
            top_k: Number of most likely tokens to draw among; 0: all; None: the model's, or all.
            top_p: Probability of the tokens to draw among, above 0, at most 1; None: the model's,
                or 1.
            seed: Seed of the draws; prompt i of a list draws with seed + i.
            stop: Text or texts before which the answer ends.
            stop_ids: Tokens at which the answer ends, besides the model's EOS.
            stream: Whether to return an iterator of pieces of the text, for a single prompt.
            template: Template of questions, as in training; by default that of training, and
                for a conversation else that of the model's folder.
            context: Context of questions that have none; needs a template.
            system: System prompt of questions that have none; needs a template.
            bos: Whether the prompt begins with BOS; None: as the tokenizer adds it.
            batch: Number of prompts computed at once.

        Returns:
            The text; of a list of prompts the list of texts; with ``stream`` an iterator.

        Raises:
            ConfigError: For a setting out of range, or a prompt that is too long.
            DataError: For a prompt that the template cannot format.
        """
        rows, several = _rows(prompt)
        if not (template or self._loaded.prompt) and any(
            "messages" in row for row in rows if not isinstance(row, str)
        ):
            template = self._chat_template()
        settings = GenerationSettings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=[stop] if isinstance(stop, str) else stop,
            stop_ids=stop_ids,
            bos=bos,
            template=template,
            context=context,
            system=system,
            batch=batch,
        )
        if stream and several:
            raise ConfigError("`stream=True` takes one prompt; call generate once for each")
        if several and not rows:
            return []
        prompted = format_prompts(self._loaded, read_prompts(rows, None, template), settings)
        engine = prompted.engine(self.model, settings)
        if stream:
            return self._streamed(engine, prompted)
        texts: list[str] = []
        with self._computing():
            for start in range(0, len(prompted.prompts), batch):
                some = prompted.prompts[start : start + batch]
                done = engine.complete(some, start, silent)
                texts += [completion.text for completion in done]
        return texts if several else texts[0]

    @torch.inference_mode()
    def logits(self, text: str | Sequence[int] | Sequence[Sequence[int]] | Tensor) -> Tensor:
        """The logits of the next token at every place: [B,S,V], float or bfloat16.

        ``text``: a text, which begins with BOS if the tokenizer adds it, or ids [S] or [B,S].
        Raises DataError for ids that are not of the vocabulary.
        """
        if isinstance(text, str):
            check_encodable(text)
            begin = begin_id(self._loaded, None)
            text = [*([] if begin is None else [begin]), *self.tokenizer.encode(text)]
        if not isinstance(text, Sequence | Tensor | np.ndarray):
            raise DataError(
                f"ids are {type(text).__name__}; give a text, or ids as a list or tensor"
            )
        try:
            ids = torch.as_tensor(text)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"ids are no table of numbers; give [S] or [B,S] ids, all of one length ({error})"
            ) from None
        if not ids.numel():
            raise ConfigError("there are no ids; give a text or at least one id")
        ids = ids.to(self.model.tp.rank_index.device)
        with self._computing():
            logits: Tensor = self.model(ids if ids.dim() == 2 else ids[None])
        return logits

    def _streamed(self, engine: Engine, prompted: PromptedModel) -> Iterator[str]:
        (prompt,) = prompted.prompts
        pieces = engine.stream([prompt], [Completion(prompt.text, len(prompt.ids))])
        while True:
            with self._computing():  # not between pieces, where the program runs
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def _chat_template(self) -> str:
        """The folder with the model's chat template; ConfigError if it has none."""
        if folder := chat_template(self._loaded):
            return folder
        raise ConfigError(
            f"{self._path} has no chat template, which messages need; give `template`, such as "
            "llama3-chat"
        )

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Use the threads of ``llamax generate``; afterwards those that the program had."""
        with kept_threads():
            choose(self._backend, self._place, self._threads)
            yield


@contextmanager
def kept_threads() -> Iterator[None]:
    """Give torch the number of threads again that it had before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "",
    tokenizer: str | Path = "",
    base: str | Path = "",
    model_class: type[Llama] = Llama,
    threads: int = 0,
    quantize: str = "",
) -> LanguageModel:
    """Load a trained model into this process.

    Args:
        path: Run (its newest step), step, Hugging Face folder, exported folder or adapter folder.
        device: "cpu", "cuda", "cuda:1" for the second GPU, or "neuron"; or torch's.
        dtype: Type of the weights, such as "bfloat16", or torch's; by default that of the files;
            float16 files are loaded as float16 on GPUs and as float32 elsewhere.
        tokenizer: Tokenizer file or folder; by default the model's or that of its dataset.
        base: Base model of adapters, if it is not where they say.
        model_class: Subclass of Llama that was trained, if one was.
        threads: CPU threads; 0: all cores.
        quantize: "int8" for linear layers in 8 bits, on device "cpu".

    Returns:
        The model, with ``generate(prompt)`` and ``logits(text)``.

    Raises:
        CheckpointError: For a model that is missing or damaged.
        DataError: For a tokenizer that is missing or does not belong to the model.
        ConfigError: For a device or type that is not known.
        BackendError: For a device that this machine does not have.
    """
    dtype = str(dtype).removeprefix("torch.")
    backend, place = _device(str(device))
    check_computing(1, threads, dtype, backend, quantize=quantize)
    loaded = open_model(Path(path), str(tokenizer), str(base))
    with kept_threads():
        try:
            chosen = choose(backend, place, threads, words=Words("device {}")).device
        except BackendError as error:
            raise BackendError(f"`device={device}` cannot be used here: {error}") from None
        model = loaded.build(Solo("tp", chosen), chosen, dtype, model_class, quantize)
    return LanguageModel(loaded, model.eval(), Path(path), backend, place, threads)


def _device(name: str) -> tuple[str, Rendezvous]:
    """The backend of a device's name, and the place of its rank on this machine."""
    backend, colon, index = name.partition(":")
    if backend not in EAGER_BACKENDS or (colon and not index.isdecimal()):
        known = ", ".join(EAGER_BACKENDS)
        raise ConfigError(f"`device={name}` is not known; use {known}, or cuda:1 for a second GPU")
    at = int(index or 0)
    if backend == "cuda" and at:
        return backend, Rendezvous(local_rank=at, local_world_size=at + 1)
    if at:
        raise ConfigError(f"`device={name}` does not exist; use {backend}")
    return backend, Rendezvous()


def _rows(
    prompt: str | Mapping[str, Any] | Messages | Sequence[str | Row | Messages],
) -> tuple[list[str | Row], bool]:
    """The prompts as texts and rows, and whether there are several."""
    if isinstance(prompt, str):
        return [prompt], False
    if isinstance(prompt, Mapping):
        return [dict(prompt)], False
    if not isinstance(prompt, Iterable):
        raise DataError(
            f"the prompt is {type(prompt).__name__}; give a text, a row or a list of these"
        )
    items = list(prompt)
    if items and all(isinstance(item, Mapping) and "role" in item for item in items):
        return [{"messages": [dict(item) for item in items]}], False  # type: ignore[arg-type]
    return [_row(item) for item in items], True


def _row(item: str | Mapping[str, Any] | Messages) -> str | Row:
    if isinstance(item, str):
        return item
    if isinstance(item, Mapping):
        return dict(item)
    if isinstance(item, Iterable):
        messages = list(item)
        if all(isinstance(message, Mapping) for message in messages):
            return {"messages": [dict(message) for message in messages]}
    raise ConfigError(
        f"prompt {item!r:.40} is neither a text, a list of messages nor a row; give one of these"
    )
