"""A llamax model for EleutherAI's lm-evaluation-harness.

::

    from llamax.inference.lm_eval import Harness
    lm_eval.simple_evaluate(model=Harness("models/dolly"), tasks=["arc_easy"])

The harness asks for the likelihood of a text after a context (``loglikelihood``), the likelihood of
a whole text (``loglikelihood_rolling``), and generated text (``generate_until``).  The model is a
Hugging Face folder, a run, a checkpoint or adapters, as for ``llamax generate``.  The package comes
with ``pip install 'llamax[eval]'``.

Source: lm-evaluation-harness documentation, "New Model Guide" (docs/model_guide.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamax.inference.engine import Engine, open_model
from llamax.inference.sampling import Sampling
from llamax.parallel.collectives import Solo
from llamax.runtime.errors import BackendError, ConfigError

try:
    from lm_eval.api.model import TemplateLM  # type: ignore[import-not-found, import-untyped, unused-ignore]
except ImportError:
    raise BackendError(
        "the harness needs the package lm-eval, which is not installed; pip install 'llamax[eval]'"
    ) from None

MOST_NEW_TOKENS = 256


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
        self.prefix = loaded.model.bos_token_id
        if self.prefix is None:
            self.prefix = loaded.model.eos_token_ids[0]

    @property
    def eot_token_id(self) -> int:
        """The token before a text that has no context."""
        assert self.prefix is not None
        return self.prefix

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches this model's prompts."""
        return str(self.folder).replace("/", "__")

    def tok_encode(self, string: str, **options: Any) -> list[int]:
        """The ids of a text; the harness's options are ignored."""
        return [int(i) for i in self.tokenizer.encode(string)]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **options: Any,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of each continuation after its context."""
        found: list[tuple[float, bool]] = []
        for start in range(0, len(requests), self.batch):
            texts = []
            for _, context, continuation in requests[start : start + self.batch]:
                begun = [self.eot_token_id, *context] if context[:1] != [self.prefix] else context
                texts.append(([*begun, *continuation][-self.longest - 1 :], len(continuation)))
            found += self._score(texts)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of each whole text, every token predicted once.

        A text longer than the model's context is cut into pieces without overlap.
        """
        found = []
        for request in requests:
            (text,) = request.args
            ids = self.tok_encode(text)
            pieces = list(self._pieces(ids))
            scores = [
                one
                for start in range(0, len(pieces), self.batch)
                for one in self._score(pieces[start : start + self.batch])
            ]
            found.append(sum(score for score, _ in scores))
        return found

    def _pieces(self, ids: list[int]) -> Iterator[tuple[list[int], int]]:
        for start in range(0, len(ids), self.longest):
            piece = ids[start : start + self.longest]
            before = ids[start - 1] if start else self.eot_token_id
            yield [before, *piece], len(piece)

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
            log_p_SV = logits_SV[start:stop, : self.tokenizer.vocab_size].float().log_softmax(-1)
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
                ids = [[self.eot_token_id, *self.tok_encode(text)][-room:] for text in some]
                done = engine.complete(some, ids, len(found), lambda text: None)
                found += [completion.text for completion in done]
        return found

    def _engine(self, options: dict[str, Any]) -> Engine:
        """An engine with a task's ``generation_kwargs``."""
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        most = int(options.get("max_gen_toks", MOST_NEW_TOKENS))
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
