"""Rules on the shape of the network."""

from __future__ import annotations

from collections.abc import Iterator

from llamax.config.rules import Rules, World, divisors, use, ways
from llamax.config.schema import Config

RULES = Rules()


@RULES.reading("model.hidden_size", "model.num_attention_heads", "model.head_dim")
def heads_divide_hidden(c: Config, world: World) -> Iterator[str]:
    whole, rest = divmod(c.model.hidden_size, c.model.num_attention_heads)
    if rest and c.model.head_dim == whole:
        yield (
            f"model.num_attention_heads={c.model.num_attention_heads} does not divide "
            f"model.hidden_size={c.model.hidden_size}; use a divisor, or a model.head_dim other "
            f"than {whole}"
        )


@RULES.reading("model.head_dim")
def heads_turn_pairs(c: Config, world: World) -> Iterator[str]:
    if c.model.head_dim % 2:
        yield (
            f"model.head_dim={c.model.head_dim} is odd, and rotary positions turn pairs of "
            f"features; use {c.model.head_dim + 1}"
        )


@RULES.reading("model.num_attention_heads", "model.num_key_value_heads")
def queries_share_keys(c: Config, world: World) -> Iterator[str]:
    heads, kv = c.model.num_attention_heads, c.model.num_key_value_heads
    if heads % kv:
        yield (
            f"model.num_key_value_heads={kv} does not divide model.num_attention_heads={heads}"
            f"{ways(use(c, world, 'model.num_key_value_heads', divisors(heads)))}"
        )


@RULES.reading("model.bos_token_id", "model.eos_token_id", "model.vocab_size")
def special_tokens_exist(c: Config, world: World) -> Iterator[str]:
    bos, eos = c.model.bos_token_id, c.model.eos_token_ids
    for name, ids in (("bos_token_id", () if bos is None else (bos,)), ("eos_token_id", eos)):
        if (token := max(ids, default=0)) >= c.model.vocab_size:
            yield (
                f"model.{name}={token} is outside model.vocab_size={c.model.vocab_size}; "
                f"use 0 to {c.model.vocab_size - 1}"
            )


@RULES.reading("model.rope_scaling.low_freq_factor", "model.rope_scaling.high_freq_factor")
def rope_bands_in_order(c: Config, world: World) -> Iterator[str]:
    rope = c.model.rope_scaling
    if rope and rope.low_freq_factor >= rope.high_freq_factor:
        yield (
            f"model.rope_scaling.low_freq_factor={rope.low_freq_factor} is not below "
            f"model.rope_scaling.high_freq_factor={rope.high_freq_factor}; Llama 3 has 1.0 and 4.0"
        )


@RULES.reading("model.rope_scaling.factor")
def rope_stretches(c: Config, world: World) -> Iterator[str]:
    rope = c.model.rope_scaling
    if rope and rope.factor < 1:
        yield (
            f"model.rope_scaling.factor={rope.factor} would shrink the context; "
            f"use 1.0 or more (Llama 3.1 has 8.0, Llama 3.2 has 32.0)"
        )
