"""A llamax model for EleutherAI's lm-evaluation-harness.

::

    from llamax.inference.lm_eval import Harness
    lm_eval.simple_evaluate(model=Harness("models/dolly"), tasks=["arc_easy"])

The harness asks for the likelihood of a text after a context (``loglikelihood``), the likelihood of
a whole text (``loglikelihood_rolling``), and generated text (``generate_until``); ids, texts and
numbers are those of its own class for transformers, ``HFLM``, with a batch size of 1 and a softmax
in float32.  The model is a Hugging Face folder, a run, a checkpoint or adapters, as for
``llamax generate``.  The package comes with ``pip install 'llamax[eval]'``.

Source: lm-evaluation-harness documentation, "New Model Guide" (docs/model_guide.md), and
``lm_eval.models.huggingface``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llamax.data.chat.encode import Encoder
from llamax.data.chat.template_source import source_of
from llamax.data.chat.templates import Template
from llamax.inference.engine import open_model
from llamax.inference.hub_tokenizer import HubTokenizer
from llamax.inference.sampling import Sampling, first_given, generate_tokens, warn_not_applied
from llamax.parallel.collectives import Solo
from llamax.runtime.errors import BackendError, ConfigError, DataError
from llamax.runtime.logging import logger

try:
    from lm_eval.api.model import TemplateLM  # type: ignore[import-not-found, import-untyped, unused-ignore]
    from lm_eval.utils import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        get_rolling_token_windows,
        make_disjoint_window,
    )
except ImportError:
    raise BackendError(
        "the harness needs the package lm-eval, which is not installed; pip install 'llamax[eval]'"
    ) from None

MOST_NEW_TOKENS = 256
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
TOP_K = 50  # of transformers, where neither the task nor the model says how many
APPLIED = frozenset(("until", "do_sample", "temperature", "top_k", "top_p", *LENGTHS))
# Settings of generation that change nothing at these values; others are refused.
WITHOUT_EFFECT: Mapping[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1, 1.0),
    "no_repeat_ngram_size": (0,),
    "length_penalty": (1, 1.0),
    "typical_p": (1, 1.0),
    "min_p": (0, 0.0),
    "use_cache": (True, False),
}


class Continuation(NamedTuple):
    """How prompts of a task are continued."""

    sampling: Sampling
    max_new_tokens: int
    until: Sequence[str]


class Harness(TemplateLM):  # type: ignore[misc, unused-ignore]
    """The model in ``folder`` on one CPU rank; ``batch`` texts are computed at once.

    ``tokenizer`` and ``base`` are those of ``llamax generate``; the other arguments are those of
    ``HFLM``.  ``max_length``: context in tokens, by default the model's.  ``add_bos_token``:
    whether texts begin with BOS, by default as the tokenizer adds it.  ``prefix_token_id``: the
    token before a text without a context.  ``chat_template_args``: further variables of the chat
    template.
    """

    def __init__(
        self,
        folder: str | Path,
        batch: int = 8,
        tokenizer: str = "",
        base: str = "",
        *,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        loaded = open_model(Path(folder), tokenizer, base)
        self.folder, self.batch, self.tokenizer = Path(folder), batch, loaded.tokenizer
        self.model = loaded.build(Solo("tp"), torch.device("cpu"))
        self.generation = loaded.generation
        self.longest = max_length or loaded.model.max_position_embeddings
        self.add_bos_token = add_bos_token
        self.chat_template_args = dict(chat_template_args)
        self.text = HubTokenizer(loaded.tokenizer)
        self.stop_ids = set(loaded.ends)
        of_model = (loaded.model.bos_token_id, *loaded.model.eos_token_ids)
        possible = (prefix_token_id, self.text.bos_id, self.text.eos_id, *of_model)
        self.prefix = next((i for i in possible if i is not None), 0)

    @property
    def max_length(self) -> int:
        """The context in tokens."""
        return self.longest

    @property
    def eot_token_id(self) -> int:
        """The token at the end of a text; without one the token before a text."""
        return self.prefix if self.text.eos_id is None else self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        return self.prefix

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches this model's prompts."""
        return str(self.folder).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        """The ids of a text, in which names of special tokens become these tokens.

        ``add_special_tokens``: whether with the tokens that the tokenizer puts around a text; None:
        as ``add_bos_token`` says, and not if the text begins with the name of BOS.
        """
        if add_special_tokens is not None:
            return self.text.encode(string, add_special_tokens)
        begins = string.startswith(self.text.decode([self.prefix], skip_special_tokens=False))
        if self.add_bos_token and not begins:
            bos = [] if self.text.bos_id is None else [self.text.bos_id]
            return [*bos, *self.text.encode(string, False)]
        return self.text.encode(string, self.add_bos_token is None and not begins)

    @cached_property
    def _template(self) -> Template:
        """The chat template beside the tokenizer; DataError if there is none."""
        folder = str(self.tokenizer.path.parent)
        return Encoder(self.tokenizer).template(folder, source_of(folder))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the chat template, if the harness asks for one."""
        return self._template.source if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, up to the beginning of the next answer.

        Without ``add_generation_prompt`` it ends with the last message, which is to be continued.
        If the template refuses the conversation, it is rendered without its system text.
        """
        try:
            return self._conversation(chat_history, add_generation_prompt)
        except DataError as error:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            logger.warning("%s; the system text is left out", error)
            return self._conversation(rest, add_generation_prompt)

    def _conversation(self, messages: list[dict[str, str]], generation_prompt: bool) -> str:
        return self._template.conversation(messages, generation_prompt, self.chat_template_args)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **options: Any,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of each continuation after its context.

        A context too long for the model loses its beginning.  Texts of like lengths are computed
        together, and once where only the last token differs.
        """
        texts = [
            ([*(context or [self.prefix]), *continuation][-self.longest - 1 :], len(continuation))
            for _, context, continuation in requests
        ]
        alike: dict[tuple[int, ...], list[int]] = {}
        for number, (ids, _) in enumerate(texts):
            alike.setdefault(tuple(ids[:-1]), []).append(number)
        inputs = sorted(alike, key=len, reverse=True)
        found: dict[int, tuple[float, bool]] = {}
        for some in _batches(inputs, self.batch):
            for ids, log_p_SV in zip(some, self._log_probabilities(some), strict=True):
                for number in alike[ids]:
                    found[number] = _score(log_p_SV[: len(ids)], *texts[number])
        return [found[number] for number in range(len(requests))]

    @torch.inference_mode()
    def _log_probabilities(self, inputs: Sequence[tuple[int, ...]]) -> Tensor:
        """Log-probabilities of the next token in each place: [B, S, V] fp32."""
        width = max(map(len, inputs))
        padded = [[*ids, *[0] * (width - len(ids))] for ids in inputs]
        logits_BSV: Tensor = self.model(torch.tensor(padded))
        return logits_BSV.float().log_softmax(-1)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of each whole text, every token predicted once.

        A text longer than the model's context is cut into windows; the last one begins earlier, so
        that its tokens have as much context before them as there is room for.
        """
        windows = [
            [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    self.tok_encode(text), self.prefix, self.longest, context_len=1
                )
            ]
            for (text,) in (request.args for request in requests)
        ]
        scores = iter(self._loglikelihood_tokens([part for parts in windows for part in parts]))
        return [sum(next(scores)[0] for _ in parts) for parts in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt, up to one of its stop texts.

        Greedy, unless a task sets ``do_sample`` or a temperature.  A prompt too long for the
        model's context loses its beginning.
        """
        warn_not_applied(self.generation)
        found: dict[int, str] = {}
        numbered = enumerate(request.args for request in requests)
        for options, alike in groupby(numbered, lambda each: each[1][1]):
            how = self._continuation(options)
            room = self.longest - how.max_new_tokens
            prompts = [
                (number, (self.tok_encode(text) or [self.prefix])[-room:])
                for number, (text, _) in alike
            ]
            if not how.sampling.temperature:  # each draw has the number of its prompt
                prompts.sort(key=lambda prompt: -len(prompt[1]))
            for some in _batches(prompts, self.batch):
                answers = self._continue([ids for _, ids in some], how, some[0][0])
                found |= zip((number for number, _ in some), answers, strict=True)
        return [found[number] for number in range(len(requests))]

    def _continue(
        self, prompts: Sequence[Sequence[int]], how: Continuation, number: int
    ) -> list[str]:
        """The answers to some prompts, of which the first has ``number`` among all prompts."""
        looks = [(stop, len(self.text.encode(stop, False)) + 2) for stop in how.until]
        answers: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        for tokens in generate_tokens(
            self.model,
            prompts,
            max_new_tokens=how.max_new_tokens,
            sampling=replace(how.sampling, seed=number),
            stop_ids=self.stop_ids,
        ):
            for i, (ids, token) in enumerate(zip(answers, tokens, strict=True)):
                if ended[i] or token is None:
                    continue
                ids.append(token)
                # As HFLM looks: at the last tokens, in which special tokens have their names.
                ended[i] = any(stop in self.text.decode(ids[-n:], False) for stop, n in looks)
            if all(ended):
                break
        return [self._answer(ids, how.until) for ids in answers]

    def _answer(self, ids: Sequence[int], until: Sequence[str]) -> str:
        """The text of an answer before the first stop text."""
        text = self.text.decode(ids)
        for stop in filter(None, until):
            text = text.partition(stop)[0]
        return text

    def _continuation(self, options: Mapping[str, Any]) -> Continuation:
        """A task's ``generation_kwargs``.

        Raises ConfigError for a setting that llamax does not have, and for a length that leaves no
        room for a prompt.
        """
        for name in sorted({*options} - APPLIED):
            if options[name] is not None and options[name] not in WITHOUT_EFFECT.get(name, ()):
                raise ConfigError(
                    f"generation_kwargs: {name}={options[name]!r:.40} is not supported; use "
                    f"{', '.join(sorted(APPLIED))}"
                )
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        if self.text.eos_id is not None:
            stops.append(self.text.decode([self.text.eos_id], skip_special_tokens=False))
        given = (options[name] for name in LENGTHS if options.get(name) is not None)
        most = int(next(given, MOST_NEW_TOKENS))
        if not 0 < most < self.longest:
            raise ConfigError(
                f"max_gen_toks={most} leaves no room for a prompt in max_position_embeddings="
                f"{self.longest} of {self.folder}; use 1 to {self.longest - 1}"
            )
        return Continuation(self._sampling(options), most, stops)

    def _sampling(self, options: Mapping[str, Any]) -> Sampling:
        """How tokens are drawn: as the task says, then the model, then transformers."""
        temperature = options.get("temperature")
        draws = options.get("do_sample")
        if draws is False or (not draws and not temperature):
            return Sampling()
        of_model = self.generation
        return Sampling(
            1.0 if temperature is None else float(temperature),
            int(first_given(options.get("top_k"), of_model.get("top_k"), TOP_K)),
            float(first_given(options.get("top_p"), of_model.get("top_p"), 1.0)),
        )


def _score(log_p_SV: Tensor, ids: Sequence[int], count: int) -> tuple[float, bool]:
    """(log-likelihood, greedy) of the last ``count`` tokens of a text."""
    start = max(len(ids) - 1 - count, 0)
    wanted_S = torch.tensor(ids[start + 1 :], dtype=torch.int64)
    score = float(log_p_SV[start:].gather(1, wanted_S[:, None]).sum())
    return score, bool((log_p_SV[start:].argmax(-1) == wanted_S).all())


def _batches(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
