"""FLOPs per token and model FLOPs utilisation."""

from __future__ import annotations

import pytest

from llamax.config.flops import flops_per_token, mfu
from llamax.config.load import load_config
from llamax.config.model import ModelConfig

# ---- numbers


@pytest.mark.parametrize("tied", [False, True])
def test_flops_count_every_matmul_once(tied: bool) -> None:
    model = ModelConfig(
        hidden_size=4,
        intermediate_size=10,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=11,
        head_dim=6,
        tie_word_embeddings=tied,
    )
    q_o, k_v, mlp, head = 2 * 4 * 12, 2 * 4 * 6, 3 * 4 * 10, 11 * 4
    attention = 3 * 5 * 2 * 6
    assert flops_per_token(model, 5) == 6 * (3 * (q_o + k_v + mlp) + head + attention)


@pytest.mark.parametrize(
    ("recipe", "nodes", "length", "sequences_per_s", "percent"),
    [
        ("llama2-7b", 16, 4096, 101.3, 36.6),
        ("llama2-7b", 16, 4096, 95.1, 34.3),
        ("llama2-13b", 32, 4096, 87.4, 30.2),
        ("llama3.1-8b", 32, 8192, 53.5, 23.2),
    ],
)
def test_mfu_of_published_runs(
    recipe: str, nodes: int, length: int, sequences_per_s: float, percent: float
) -> None:
    """AWS Neuron's published trn1.32xlarge throughputs: 16 chips a node at 190 TFLOP/s."""
    flops = flops_per_token(load_config(recipe).model, length)
    found = mfu(sequences_per_s * length, flops, nodes * 16 * 190e12)
    assert round(100 * found, 1) == percent
