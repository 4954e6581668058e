"""Sampling in one process, compared with transformers: the cache, greedy, filters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from support.models import tiny
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from llamax.config.model import RopeScaling
from llamax.inference.kv_cache import KVCache
from llamax.inference.sampling import Sampling, check_prompts, generate_tokens, join_steps, nucleus
from llamax.model.llama import Llama
from llamax.runtime.errors import CheckpointError, ConfigError

LLAMA2 = tiny(
    hidden_size=64,
    intermediate_size=96,
    num_key_value_heads=4,
    vocab_size=320,
    max_position_embeddings=96,
    initializer_range=0.2,
)


LLAMA31 = dataclasses.replace(
    LLAMA2,
    num_key_value_heads=2,
    rope_theta=500_000.0,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32),
)


FAMILIES = {
    "llama2": LLAMA2,
    "llama3.1": LLAMA31,
    "llama3.2 (tied)": dataclasses.replace(LLAMA31, tie_word_embeddings=True, head_dim=32),
}


LENGTHS = (1, 7, 23)


NEW = 24


def prompts(lengths: Sequence[int] = LENGTHS, vocab_size: int = 320) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama(LLAMA31).init(0)


def theirs(model: Llama) -> transformers.LlamaForCausalLM:
    """transformers' Llama with the weights of ``model``."""
    config = transformers.LlamaConfig(**model.config.to_hub("float32"))
    reference = transformers.LlamaForCausalLM(config)
    weights = dict(reference.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for part in model.sharded_parameters().parts(name):
                rows = parameter if part.length < 0 else parameter[part.start :][: part.length]
                weights[part.name].copy_(rows)
    return reference


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_token_for_token_in_a_batch_of_unequal_prompts(
    family: str,
) -> None:
    model = Llama(FAMILIES[family]).init(1)
    reference = theirs(model)
    made = join_steps(generate_tokens(model, prompts(), max_new_tokens=NEW))
    for prompt, found in zip(prompts(), made, strict=True):
        whole = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert found == whole[0, len(prompt) :].tolist()
    assert len({token for row in made for token in row}) > 8, "the text must not be one token"


def test_decoding_computes_the_logits_of_the_whole_text(model: Llama) -> None:
    """Every step through the cache equals the same place of one long forward pass."""
    text, lengths = torch.tensor(prompts((30, 30))), torch.tensor([5, 17])
    with torch.no_grad():
        whole_BSV = model(text)
        cache = KVCache(30)
        padded = text.where(torch.arange(30) < lengths[:, None], 0)[:, :17]
        found = model(padded, attend=cache.prefill, last_B=lengths - 1)
        assert found.shape == (2, 1, 320), "only the last places are projected"
        for step in range(13):
            at = (lengths + step)[:, None]
            expected = whole_BSV.take_along_dim(at[:, :, None] - 1, 1)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            attend = cache.decode(at, int(at.max()) + 1)
            found = model(text.gather(1, at), at, attend=attend)


def test_the_cache_is_allocated_once(model: Llama) -> None:
    cache = KVCache(8)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), attend=cache.prefill)
        before = [keys.data_ptr() for keys, _ in cache.layers.values()]
        at = torch.tensor([[3]])
        model(torch.tensor([[4]]), at, attend=cache.decode(at, 4))
    assert [keys.data_ptr() for keys, _ in cache.layers.values()] == before
    assert all(keys.shape == (1, 2, 8, 16) for keys, _ in cache.layers.values())


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=40, top_p=0.9, seed=5)])
def test_a_prompt_generates_the_same_text_in_a_batch_and_alone(
    model: Llama, sampling: Sampling
) -> None:
    together = join_steps(generate_tokens(model, prompts(), max_new_tokens=NEW, sampling=sampling))
    for row, prompt in enumerate(prompts()):
        seeded = dataclasses.replace(sampling, seed=sampling.seed + row)
        [alone] = join_steps(generate_tokens(model, [prompt], max_new_tokens=NEW, sampling=seeded))
        assert together[row] == alone


def test_a_seed_repeats_and_another_differs(model: Llama) -> None:
    def say(seed: int) -> list[list[int]]:
        sampling = Sampling(1.0, seed=seed)
        return join_steps(generate_tokens(model, prompts(), max_new_tokens=NEW, sampling=sampling))

    assert say(3) == say(3)
    assert say(3) != say(4)


def test_a_stop_token_is_the_last_of_its_prompt_and_of_no_other(model: Llama) -> None:
    free = join_steps(generate_tokens(model, prompts(), max_new_tokens=NEW))
    stop = free[1][4]
    at = free[1].index(stop)
    steps = list(generate_tokens(model, prompts(), max_new_tokens=NEW, stop_ids=[stop]))
    for row, tokens in enumerate(free):
        end = tokens.index(stop) + 1 if stop in tokens else NEW
        found = [step[row] for step in steps]
        assert found == tokens[:end] + [None] * (len(steps) - end)
    everything = list(
        generate_tokens(model, prompts((3,)), max_new_tokens=NEW, stop_ids=range(320))
    )
    assert len(everything) == 1, "no step is made when all have ended"
    assert at < NEW - 1


def test_ids_past_the_tokenizer_are_never_drawn(model: Llama) -> None:
    sampling = Sampling(50.0)
    made = join_steps(
        generate_tokens(model, prompts(), max_new_tokens=40, sampling=sampling, vocab_size=10)
    )
    assert {token for row in made for token in row} == set(range(10))


def test_bfloat16_generates() -> None:
    model = Llama(LLAMA31, dtype=torch.bfloat16).init(0)
    made = join_steps(generate_tokens(model, prompts(), max_new_tokens=4))
    assert [len(row) for row in made] == [4, 4, 4]


def test_prompts_that_do_not_fit_are_refused() -> None:
    model = dataclasses.replace(LLAMA2, max_position_embeddings=16)
    check_prompts(model, [[1] * 6], 10)
    for wrong, new, said in (
        ([[1]], 0, "`max_new_tokens=0` makes no token"),
        ([], 4, "there are no prompts"),
        ([[1], []], 4, "prompt 2 has no tokens"),
        ([[1, 320]], 4, "prompt 1 has token 320, but the model has ids 0 to 319"),
        ([[1, -1]], 4, "prompt 1 has token -1"),
        ([[1] * 7], 10, r"prompt 1 has 7 tokens and 10 more .*=16; use `max_new_tokens=9` or a"),
        ([[1] * 16], 1, "=16; use a shorter prompt"),
    ):
        with pytest.raises(ConfigError, match=said):
            generate_tokens(Llama(model), wrong, max_new_tokens=new)


def test_a_model_without_numbers_is_refused(model: Llama) -> None:
    broken = Llama(LLAMA31).init(0)
    broken.head.dense().data[3] = math.nan
    with pytest.raises(CheckpointError, match="not finite"):
        next(generate_tokens(broken, [[1]], max_new_tokens=1))
    next(generate_tokens(model, [[1]], max_new_tokens=1))


# --- sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [{"temperature": -1.0}, {"temperature": math.nan}])
@pytest.mark.parametrize("more", [{}, {"top_k": 3}])
def test_settings_out_of_range_are_refused(setting: dict[str, float], more: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"temperature=.* is out of range; use 0 or more"):
        Sampling(**setting, **more)


@pytest.mark.parametrize(
    ("setting", "use"),
    [
        ({"top_k": -1}, "0 .all. or more"),
        ({"top_p": 0.0}, "a number above 0, at most 1"),
        ({"top_p": 1.1}, "a number above 0, at most 1"),
        ({"seed": -1}, "0 or more"),
    ],
)
def test_filters_out_of_range_are_refused(setting: dict[str, float], use: str) -> None:
    with pytest.raises(ConfigError, match=f"is out of range; use {use}"):
        Sampling(1.0, **setting)


@pytest.mark.parametrize("spread", [0.1, 3.0])
@pytest.mark.parametrize("top_k", [0, 1, 50, 5000])
@pytest.mark.parametrize("top_p", [0.05, 0.9, 1.0])
def test_filters_keep_what_transformers_keeps(spread: float, top_k: int, top_p: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 1000) * spread
    expected = logits / 0.7
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = Sampling(0.7, top_k, top_p).filter(logits)
    torch.testing.assert_close(found.softmax(-1), expected.softmax(-1))
    assert torch.equal(found.isfinite(), expected.isfinite())


def test_the_nucleus_is_the_fewest_tokens_that_hold_p() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    for top_p, lowest in ((0.3, 0.5), (0.49, 0.5), (0.6, 0.2), (0.95, 0.1), (0.99999, 0.1)):
        assert nucleus(logits, top_p).exp().item() == pytest.approx(lowest)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -math.inf, 0.5])
    n, sampling = 20_000, Sampling(0.5, top_k=4, top_p=0.97)
    expected = sampling.filter(logits[None])[0].softmax(-1)
    assert expected[[3, 4]].tolist() == [0, 0]
    stream = torch.Generator().manual_seed(0)
    drawn = sampling.pick(logits.expand(n, -1), [stream] * n)
    share = torch.bincount(drawn, minlength=6) / n
    error = (expected * (1 - expected) / n).sqrt()
    assert ((share - expected).abs() <= 4 * error).all()


def test_a_token_without_probability_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even by the lowest number a stream can give."""
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.zeros((), dtype=torch.float64))
    logits, sampling = torch.tensor([[-math.inf, 0.0, 1.0]]), Sampling(1.0)
    assert sampling.pick(logits, sampling.streams(1)).tolist() == [1]


def test_temperature_near_zero_is_greedy() -> None:
    logits = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    cold = Sampling(1e-30)
    assert torch.equal(cold.pick(logits, cold.streams(8)), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-320, 1e-50, 1e-38, 1e-9])
@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.5}])
def test_a_temperature_next_to_zero_takes_the_most_likely_token(
    temperature: float, settings: dict[str, Any]
) -> None:
    logits_BV = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature, seed=1, **settings)
    assert sampling.pick(logits_BV, sampling.streams(4)).equal(logits_BV.argmax(-1))
