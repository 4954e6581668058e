"""Sampling: the loop that generates tokens, and how one token is chosen.

::

    prefill   prompts fill the cache; logits of each one's last token       ─┐
    decode    one token per prompt attends to the cache  ─> logits <────────┘
                 ^                                            │
                 └── token <── draw <── top_p <── top_k <── / temperature

Both filters are a threshold of the logits; logits equal to it stay.  The draw inverts the
cumulative distribution at one uniform number per sequence and token, so a choice depends only on
the logits and that number: tensor-parallel ranks have equal logits and agree without communication.

Sources: top-k, Fan et al. 2018, section 5.1; top-p, Holtzman et al. 2020, section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llamax.config.model import ModelConfig
from llamax.inference.checks import check_number
from llamax.inference.kv_cache import KVCache
from llamax.inference.one_token import one_token
from llamax.model.llama import Llama
from llamax.runtime.errors import CheckpointError, ConfigError, check_whole
from llamax.runtime.logging import logger
from llamax.runtime.units import count

Prompts = Sequence[Sequence[int]]

# Settings of generation_config.json that are reported, unless they have one of these values.
NOT_APPLIED: dict[str, tuple[object, ...]] = {
    "repetition_penalty": (None, 1, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "min_p": (None, 0, 0.0),
    "typical_p": (None, 1, 1.0),
    "num_beams": (None, 1),
    "suppress_tokens": (None, []),
}
SEEDS = 2**62  # the number of seeds
LEAST_TEMPERATURE = 1e-30  # float32 divides by what is much less as by zero
FIRST_LOOK = 64  # most likely tokens that top_p looks at first


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; ``temperature`` 0 takes the most likely one.

    ``top_k`` 0 and ``top_p`` 1 admit the whole vocabulary.  Sequence i of a batch draws with
    ``seed + i``: its text is the same as alone with that seed.  Raises ConfigError for a value out
    of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            check_number(name, getattr(self, name))
        for name in ("top_k", "seed"):
            check_whole(name, getattr(self, name))
        for name, value, holds, use in (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "a number above 0, at most 1"),
            ("seed", self.seed, 0 <= self.seed < SEEDS, "0 or more, below 2^62"),
        ):
            if not holds:
                raise ConfigError(f"`{name}={value}` is out of range; use {use}")

    def streams(self, batch: int) -> list[torch.Generator]:
        """One stream of uniform numbers per sequence."""
        return [torch.Generator().manual_seed(self.seed + i) for i in range(batch)]

    def pick(self, logits_BV: Tensor, streams: Sequence[torch.Generator]) -> Tensor:
        """The next token of each sequence: [B, V] -> [B] int64."""
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        kept_BV = self.filter(logits_BV)
        mass_BV = kept_BV.softmax(-1).cumsum(-1, dtype=torch.float64)
        drawn = [torch.rand((), dtype=torch.float64, generator=stream) for stream in streams]
        drawn_B1 = torch.stack(drawn).to(mass_BV.device)[:, None] * mass_BV[:, -1:]
        return torch.searchsorted(mass_BV, drawn_B1, right=True)[:, 0]

    def filter(self, logits_BV: Tensor) -> Tensor:
        """Logits over the temperature in fp32, -inf where a token may not be drawn."""
        logits_BV = logits_BV.float()
        logits_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
        logits_BV = logits_BV / max(self.temperature, LEAST_TEMPERATURE)
        if 0 < self.top_k < logits_BV.shape[-1]:
            lowest_B1 = logits_BV.topk(self.top_k).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < lowest_B1, -math.inf)
        if self.top_p < 1:
            lowest_B1 = nucleus(logits_BV, self.top_p)
            logits_BV = logits_BV.masked_fill(logits_BV < lowest_B1, -math.inf)
        return logits_BV


def sampling_of(
    generation: Mapping[str, Any],
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Sampling:
    """The sampling that a generation_config.json asks for; values that are given come first.

    Without settings the temperature is 0.8 over the whole vocabulary.  ``do_sample`` true without
    a temperature means 1, and false the most likely token, as in transformers.  Warns about
    settings that llamax does not apply.  Raises ConfigError for values out of range.
    """
    sample = generation.get("do_sample")
    warn_not_applied(generation)
    found = {name: generation.get(name) for name in ("temperature", "top_k", "top_p")}
    for name, value in found.items():
        if value is not None and not (type(value) in (int, float) and abs(value) < 2**31):
            raise ConfigError(f"generation_config.json: {name} is {value!r:.40}; use a number")
    usual = 0.8 if sample is None else 1.0
    of_model = 0.0 if sample is False else first_given(found["temperature"], usual)
    return Sampling(
        first_given(temperature, of_model),
        int(first_given(None if top_k is None else check_whole("top_k", top_k), found["top_k"], 0)),
        first_given(top_p, found["top_p"], 1.0),
        seed,
    )


def warn_not_applied(generation: Mapping[str, Any]) -> None:
    """Warn about the settings of a generation_config.json that llamax does not apply."""
    for name in (name for name in NOT_APPLIED if generation.get(name) not in NOT_APPLIED[name]):
        logger.warning(
            "generation_config.json: %s=%s is not applied; llamax has temperature, top_k and top_p",
            name,
            generation[name],
        )


def first_given(*values: float | None) -> float:
    """The first value that is given."""
    return next(value for value in values if value is not None)


def nucleus(logits_BV: Tensor, top_p: float) -> Tensor:
    """The lowest logit of the fewest tokens that hold ``top_p`` of the probability: -> [B, 1].

    Sorting a vocabulary costs as much as computing its logits, so the most likely few are sorted
    first, and more only if those do not hold enough.
    """
    V, look = logits_BV.shape[-1], FIRST_LOOK
    log_sum_B1 = logits_BV.logsumexp(-1, keepdim=True)
    while True:
        top_BN = logits_BV.topk(min(look, V)).values
        mass_BN = (top_BN - log_sum_B1).exp().cumsum(-1)
        if look >= V or bool((mass_BN[:, -1] >= top_p).all()):
            needed_B1 = (mass_BN < top_p).sum(-1, keepdim=True).clamp(max=top_BN.shape[-1] - 1)
            return top_BN.gather(-1, needed_B1)
        look *= 8


def generate_tokens(
    model: Llama,
    prompts: Prompts,
    *,
    max_new_tokens: int = 100,
    sampling: Sampling = Sampling(),
    stop_ids: Collection[int] = (),
    vocab_size: int | None = None,
) -> Iterator[list[int | None]]:
    """Continue every prompt; each step yields the next token of each, or None if it has ended.

    A prompt ends with the first token in ``stop_ids``, which is yielded, or after
    ``max_new_tokens``.  Only ids below ``vocab_size`` (such as the tokenizer's) are drawn; by
    default all of the model's.  A sequence-parallel model is refused; take its weights:
    ``whole = Llama(model.config, model.tp, device="meta")``, then
    ``whole.load_state_dict(model.state_dict(), assign=True)``.  Raises ConfigError for prompts
    that ``check_prompts`` refuses, and CheckpointError if the model's logits are not finite.
    """
    check_prompts(model.config, prompts, max_new_tokens)
    if model.sequence_parallel:
        raise ConfigError(
            "the model is sequence-parallel, and generating takes one token at a time; build it "
            "with sequence_parallel=False"
        )
    return _steps(model, prompts, max_new_tokens, sampling, frozenset(stop_ids), vocab_size)


def join_steps(steps: Iterator[list[int | None]]) -> list[list[int]]:
    """The new tokens of each prompt: all steps of ``generate_tokens``, joined."""
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


def check_prompts(config: ModelConfig, prompts: Prompts, max_new_tokens: int) -> None:
    """Raise ConfigError for a prompt that is empty, outside the vocabulary or too long."""
    if check_whole("max_new_tokens", max_new_tokens) < 1:
        raise ConfigError(f"`max_new_tokens={max_new_tokens}` makes no token; use 1 or more")
    if not prompts:
        raise ConfigError("there are no prompts; give at least one")
    longest = config.max_position_embeddings
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ConfigError(f"prompt {number} has no tokens; start it with a text or a BOS token")
        for strange in (token for token in prompt if not 0 <= token < config.vocab_size):
            raise ConfigError(
                f"prompt {number} has token {strange}, but the model has ids 0 to "
                f"{config.vocab_size - 1}; use the tokenizer it was trained with"
            )
        if len(prompt) + max_new_tokens > longest:
            left = longest - len(prompt)
            use = f"use `max_new_tokens={left}` or a" if left > 0 else "use a"
            tokens = count(len(prompt), "token")
            raise ConfigError(
                f"prompt {number} has {tokens} and {max_new_tokens} more would "
                f"pass max_position_embeddings={longest}; {use} shorter prompt"
            )


def check_finite(finite: bool) -> None:
    """Raise CheckpointError where logits of a model, or their losses, are not finite."""
    if not finite:
        raise CheckpointError(
            "the model's logits are not finite: its training diverged or its weights are damaged; "
            "use an earlier checkpoint"
        )


@torch.inference_mode()
def _steps(
    model: Llama,
    prompts: Prompts,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: frozenset[int],
    vocab_size: int | None,
) -> Iterator[list[int | None]]:
    device = model.tp.rank_index.device
    width = max(map(len, prompts))
    padded = [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]
    cache, streams = KVCache(width + max_new_tokens - 1), sampling.streams(len(prompts))
    last_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    live, forward = [True] * len(prompts), one_token(model)

    logits_B1V = model(torch.tensor(padded, device=device), attend=cache.prefill, last_B=last_B)
    check_finite(bool(logits_B1V.isfinite().all()))
    for made in range(1, max_new_tokens + 1):
        tokens_B = sampling.pick(logits_B1V[:, 0, :vocab_size], streams)
        tokens = tokens_B.tolist()
        yield [token if alive else None for token, alive in zip(tokens, live, strict=True)]
        live = [a and token not in stop_ids for a, token in zip(live, tokens, strict=True)]
        if made == max_new_tokens or not any(live):
            return
        positions_B1 = (last_B + made)[:, None]
        logits_B1V = forward(tokens_B[:, None], positions_B1, cache, width + made)
