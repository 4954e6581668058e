"""Model FLOPs of a token and their share of a device's peak.

Model FLOPs follow PaLM (Chowdhery et al. 2022, appendix B), with causal attention counted once: a
matmul weight costs 2 FLOPs a token forward and 4 backward, and a token attends to half the sequence
on average.  Recomputation does not count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llamax.config.model import ModelConfig

if TYPE_CHECKING:
    pass


# ---- numbers


def flops_per_token(model: ModelConfig, sequence_length: int, adapters: int = 0) -> int:
    """FLOPs of a token, forward and backward: 6 a matmul weight, 6 L S H E of causal attention.

    Beside ``adapters`` weights that are trained the model is frozen: 4 a weight, for it has no
    gradient of its own, and 6 an adapter's.
    """
    D, E, heads = model.hidden_size, model.head_dim, model.num_attention_heads
    attention = 2 * D * E * (heads + model.num_key_value_heads)
    layers = model.num_hidden_layers * (attention + 3 * D * model.intermediate_size)
    scores = model.num_hidden_layers * sequence_length * heads * E
    weights = layers + model.vocab_size * D
    return 6 * scores + (4 * weights + 6 * adapters if adapters else 6 * weights)


def mfu(tokens_per_s: float, flops_per_token: float, peak_flops: float) -> float:
    """Model FLOPs utilisation, 0 to 1; ``peak_flops`` a second of all devices, 0 where unknown."""
    return tokens_per_s * flops_per_token / peak_flops if peak_flops else 0.0
