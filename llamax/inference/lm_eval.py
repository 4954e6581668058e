"""A llamax model for EleutherAI's lm-evaluation-harness.

::

    from llamax.inference.lm_eval import Harness
    lm_eval.simple_evaluate(model=Harness("models/dolly"), tasks=["arc_easy"])

The harness asks for the likelihood of a text after a context (``loglikelihood``), the likelihood of
a whole text (``loglikelihood_rolling``), and generated text (``generate_until``); ids and numbers
are those of its own class for transformers, ``HFLM``.  The model is a Hugging Face folder, a run, a
checkpoint or adapters, as for ``llamax generate``.  The package comes with
``pip install 'llamax[eval]'``.

Source: lm-evaluation-harness documentation, "New Model Guide" (docs/model_guide.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamax.data.chat.encode import Encoder
from llamax.data.chat.templates import Span, Template, source_of
from llamax.inference.engine import Engine, open_model
from llamax.inference.sampling import Sampling
from llamax.parallel.collectives import Solo
from llamax.runtime.errors import BackendError, ConfigError

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


class Harness(TemplateLM):  # type: ignore[misc, unused-ignore]
    """The model in ``folder`` on one CPU rank; ``batch`` texts are computed at once.

    ``tokenizer`` and ``base`` are those of ``llamax generate``.
    """

    def __init__(
        self, folder: str | Path, batch: int = 8, tokenizer: str = "", base: str = ""
    ) -> None:
        super().__init__()
        loaded = open_model(Path(folder), tokenizer, base)
        self.folder, self.batch, self.tokenizer = Path(folder), batch, loaded.tokenizer
        self.model = loaded.build(Solo("tp"), torch.device("cpu"))
        self.stop_ids = set(loaded.model.eos_token_ids)
        self.longest = loaded.model.max_position_embeddings
        own = (self.tokenizer.bos_id, self.tokenizer.eos_id)
        of_model = (loaded.model.bos_token_id, *loaded.model.eos_token_ids)
        self.prefix = next((i for i in (*own, *of_model) if i is not None), 0)
        if self.tokenizer.eos_id is not None:
            self.stop_ids.add(self.tokenizer.eos_id)
        self._encoders = {
            begin: Encoder(self.tokenizer, bos=begin, eos=False) for begin in (False, True)
        }

    @property
    def eot_token_id(self) -> int:
        """The token before a text that has no context."""
        return self.prefix

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

        ``add_special_tokens``: whether it begins with BOS; None: as the tokenizer adds it.
        """
        chosen = self.tokenizer.adds_bos if add_special_tokens is None else add_special_tokens
        begins = bool(chosen) and self.tokenizer.bos_id is not None
        if not string:
            return [self.prefix] if begins else []
        (tokens,) = self._encoders[begins].encode([[Span(string, False)]], prompts=True)
        return [int(i) for i in tokens.ids]

    @cached_property
    def _template(self) -> Template:
        """The chat template beside the tokenizer; DataError if there is none."""
        folder = str(self.tokenizer.path.parent)
        return self._encoders[False].template(folder, source_of(folder))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the chat template, if the harness asks for one."""
        return self._template.source if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, up to the beginning of the next answer.

        Without ``add_generation_prompt`` it ends with the last message, which is to be continued.
        """
        return self._template.conversation(chat_history, add_generation_prompt)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **options: Any,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of each continuation after its context."""
        found: list[tuple[float, bool]] = []
        for start in range(0, len(requests), self.batch):
            found += self._score(
                [
                    ([*context, *continuation][-self.longest - 1 :], len(continuation))
                    for _, context, continuation in requests[start : start + self.batch]
                ]
            )
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of each whole text, every token predicted once.

        A text longer than the model's context is cut into windows; the last one begins earlier, so
        that its tokens have as much context before them as there is room for.
        """
        found = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix, self.longest, context_len=1
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(score for score, _ in self._loglikelihood_tokens(parts)))
        return found

    @torch.inference_mode()
    def _score(self, texts: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """(log-likelihood, greedy) of the last ``count`` tokens of each text."""
        width = max(len(ids) for ids, _ in texts) - 1
        padded = [[*ids[:-1], *[0] * (width + 1 - len(ids))] for ids, _ in texts]
        logits_BSV: Tensor = self.model(torch.tensor(padded))
        found = []
        for (ids, count), logits_SV in zip(texts, logits_BSV, strict=True):
            stop = len(ids) - 1
            start = max(stop - count, 0)
            log_p_SV = logits_SV[start:stop].float().log_softmax(-1)
            wanted_S = torch.tensor(ids[start + 1 :])
            score = float(log_p_SV.gather(1, wanted_S[:, None]).sum())
            found.append((score, bool((log_p_SV.argmax(-1) == wanted_S).all())))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt, up to one of its stop texts.

        Greedy, unless a task sets ``do_sample``.  A prompt too long for the model's context loses
        its beginning.
        """
        found: list[str] = []
        for options, alike in groupby((request.args for request in requests), lambda each: each[1]):
            engine = self._engine(options)
            room = self.longest - engine.max_new_tokens
            texts = [text for text, _ in alike]
            for start in range(0, len(texts), self.batch):
                some = texts[start : start + self.batch]
                ids = [(self.tok_encode(text) or [self.prefix])[-room:] for text in some]
                done = engine.complete(some, ids, len(found), lambda text: None)
                found += [completion.text for completion in done]
        return found

    def _engine(self, options: dict[str, Any]) -> Engine:
        """An engine with a task's ``generation_kwargs``."""
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        given = (options[name] for name in LENGTHS if options.get(name) is not None)
        most = int(next(given, MOST_NEW_TOKENS))
        if not 0 < most < self.longest:
            raise ConfigError(
                f"max_gen_toks={most} leaves no room for a prompt in max_position_embeddings="
                f"{self.longest} of {self.folder}; use 1 to {self.longest - 1}"
            )
        sampling = Sampling()
        if options.get("do_sample"):
            sampling = Sampling(
                float(options.get("temperature", 1.0)),
                int(options.get("top_k", 0)),
                float(options.get("top_p", 1.0)),
            )
        return Engine(self.model, self.tokenizer, sampling, most, stops, self.stop_ids)
