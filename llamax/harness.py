"""A llamax model for EleutherAI's lm-evaluation-harness.

::

    from llamax.harness import Harness
    lm_eval.simple_evaluate(model=Harness("models/dolly"), tasks=["arc_easy"])

The harness asks three things: how likely a text is after a context (``loglikelihood``), how likely
a whole text is (``loglikelihood_rolling``), and what the model says (``generate_until``).  MODEL is
whatever ``llamax generate`` takes: a Hugging Face folder, a run, a checkpoint, adapters.

Source: lm-evaluation-harness documentation, "New Model Guide" (docs/model_guide.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from llamax.collectives import Solo
from llamax.sampling import Sampling
from llamax.speaker import Speaker, open_given

MOST_NEW_TOKENS = 256


class Harness(TemplateLM):  # type: ignore[misc, unused-ignore]
    """The model in ``folder`` on one CPU rank; ``batch`` texts are computed at once."""

    def __init__(self, folder: str | Path, batch: int = 8, tokenizer: str = "") -> None:
        super().__init__()
        given = open_given(Path(folder), tokenizer)
        self.folder, self.batch, self.tokenizer = Path(folder), batch, given.tokenizer
        self.model = given.build(Solo("tp"), torch.device("cpu"))
        self.ends = set(given.model.eos_token_ids)
        self.longest = given.model.max_position_embeddings
        self.prefix = given.model.bos_token_id
        if self.prefix is None:
            self.prefix = given.model.eos_token_ids[0]

    @property
    def eot_token_id(self) -> int:
        """What comes before a text that has no context."""
        assert self.prefix is not None
        return self.prefix

    @property
    def tokenizer_name(self) -> str:
        """What tells cached prompts of one model from those of another."""
        return str(self.folder).replace("/", "__")

    def tok_encode(self, string: str, **options: Any) -> list[int]:
        """The ids of a text; the harness's own options change nothing here."""
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
        logits_BSV = logits_BSV[..., : self.tokenizer.vocab_size].float().log_softmax(-1)
        found = []
        for (ids, count), logits_SV in zip(texts, logits_BSV, strict=True):
            stop = len(ids) - 1
            mine_SV = logits_SV[max(stop - count, 0) : stop]
            wanted_S = torch.tensor(ids[-len(mine_SV) :])
            score = float(mine_SV.gather(1, wanted_S[:, None]).sum())
            found.append((score, bool((mine_SV.argmax(-1) == wanted_S).all())))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy answer to each prompt, up to one of its stop texts."""
        found = []
        for request in requests:
            context, options = request.args
            until = options.get("until") or []
            stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
            most = int(options.get("max_gen_toks", MOST_NEW_TOKENS))
            ids = [self.eot_token_id, *self.tok_encode(context)][-(self.longest - most) :]
            speaker = Speaker(self.model, self.tokenizer, Sampling(), most, stops, self.ends)
            (done,) = speaker.speak([context], [ids], 0, lambda text: None)
            found.append(done.text)
        return found
