"""Decoding with static shapes, on a CPU: the programs' arithmetic and the errors around it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import TIED, tiny

from llamax.backends.base import EagerDevice
from llamax.cli.generate import main
from llamax.inference.generate import GenerationSettings, precompile
from llamax.inference.sampling import Sampling, generate_tokens, join_steps
from llamax.inference.static_decoding import (
    StaticDecoder,
    bucket,
    buckets,
    cache_length,
    choose,
    static_tokens,
)
from llamax.model.llama import Llama
from llamax.parallel.collectives import Solo
from llamax.runtime.errors import CheckpointError, ConfigError

MODEL = tiny(initializer_range=0.4, max_position_embeddings=200)
PROMPTS = [[1, 2, 3], [4] * 70, [5, 6]]


def decoder(model: Llama, greedy: bool = True) -> StaticDecoder:
    return StaticDecoder(model, EagerDevice(), 4, 100, greedy, 50)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_batch_that_is_not_full_gets_the_tokens_of_the_growing_cache(temperature: float) -> None:
    model, sampling = Llama(MODEL).init(0), Sampling(temperature, top_k=30, seed=3)
    made = static_tokens(decoder(model, temperature == 0), PROMPTS, 12, sampling, {7})
    expected = generate_tokens(
        model, PROMPTS, max_new_tokens=12, sampling=sampling, stop_ids={7}, vocab_size=50
    )
    assert join_steps(made) == join_steps(expected)


def test_the_lowest_of_equal_logits_is_chosen_within_the_vocabulary_and_nan_is_noticed() -> None:
    logits = torch.zeros(4, 8)
    logits[0, [2, 5]] = 1.0
    logits[1, 7] = 9.0  # beyond the vocabulary
    logits[2, 3] = math.nan
    logits[3, 7] = math.inf  # what is not chosen among does not count
    tokens, finite = choose(logits, Solo("tp"), vocab_size=7)
    assert tokens[[0, 1, 3]].tolist() == [2, 0, 0]
    assert finite.tolist() == [True, True, False, True]


def test_a_cache_without_memory_names_the_settings_of_generate() -> None:
    with pytest.raises(ConfigError, match="use a smaller `batch` or `length`"):
        StaticDecoder(Llama(MODEL), EagerDevice(), 10**12, 100, True)


@pytest.mark.parametrize("greedy", [True, False])
def test_logits_that_are_not_finite_are_an_error(greedy: bool) -> None:
    model = Llama(TIED).init(0)
    with torch.no_grad():
        model.head.dense()[3] = math.nan
    tokens = static_tokens(decoder(model, greedy), [[1]], 4, Sampling(1.0 - greedy), ())
    with pytest.raises(CheckpointError, match="the model's logits are not finite"):
        next(tokens)


def test_buckets_are_powers_of_two_up_to_the_cache() -> None:
    assert [bucket(tokens, 100) for tokens in (1, 64, 65, 100)] == [64, 64, 100, 100]
    assert (buckets(300), buckets(64), buckets(2)) == ([64, 128, 256, 300], [64], [2])
    assert cache_length(MODEL, [[1] * 30], 100) == 200  # 256, but for the model's context
    assert cache_length(MODEL, [[1] * 30], 20) == 64
    assert cache_length(MODEL, [[1] * 30], 20, 150) == 150


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (201, "`length=201` is beyond max_position_embeddings=200 of the model"),
        (49, "`length=49` is too short: the longest prompt has 30 tokens, and 20 more are"),
    ],
)
def test_a_cache_that_does_not_fit_is_an_error(asked: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cache_length(MODEL, [[1] * 30], 20, asked)


@pytest.mark.parametrize(
    ("length", "backend", "message"),
    [
        (64, "cpu", "`length=64` is of backend xla alone, and `backend=cpu` takes every length"),
        (-1, "xla", "`length=-1` is out of range; use 0 or more"),
    ],
)
def test_a_length_that_cannot_be_is_an_error(length: int, backend: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(GenerationSettings(), length=length, backend=backend)


def test_a_limit_below_zero_is_an_error() -> None:
    with pytest.raises(ConfigError, match="`limit=-2` is out of range; use 0 or more"):
        GenerationSettings(limit=-2)


def test_precompiling_needs_the_shapes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`precompile` needs `backend` xla and `length`"):
        precompile(tmp_path, GenerationSettings())
    with pytest.raises(ConfigError, match="--precompile takes one model and no prompts"):
        main([str(tmp_path), "--precompile", "--prompt", "a"])
