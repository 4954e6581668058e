"""One tiny Llama for all tests, and variations of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llamax.config.model import ModelConfig, RopeScaling

TINY = ModelConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,  # fewer than 4 tensor ranks
    vocab_size=61,  # which no degree divides
    max_position_embeddings=64,
    initializer_range=0.1,  # so that attention is not uniform before training
)


def tiny(**changes: Any) -> ModelConfig:
    """TINY with changes; heads take their width from the hidden size unless it is given."""
    return replace(TINY, **{"head_dim": 0, **changes})


# A key/value head for each query head, as Llama 2 has.
LLAMA2 = tiny(num_key_value_heads=4)
# Fewer key/value heads, scaled rotary embeddings and tied embeddings, as Llama 3.2 has.
LLAMA3 = replace(
    LLAMA2,
    num_key_value_heads=2,
    rope_theta=500_000.0,
    rope_scaling=RopeScaling(original_max_position_embeddings=16),
    tie_word_embeddings=True,
)
# The only key/value head is on every tensor rank, and so is the tied embedding.
TIED = tiny(num_hidden_layers=1, num_key_value_heads=1, tie_word_embeddings=True)
# Blocks of 64 quantised weights fit in a row, and 4 tensor ranks cut through them (192 / 4).
WIDE = tiny(hidden_size=128, intermediate_size=192)
# Weights so large that no two logits are close, and tokens of a trained tokenizer.
DECIDED = tiny(
    num_hidden_layers=1,
    vocab_size=600,
    max_position_embeddings=128,
    initializer_range=0.5,
    bos_token_id=1,
    eos_token_id=2,
)
