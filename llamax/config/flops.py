"""Model FLOPs of a token, and model FLOPs utilisation (MFU).

Model FLOPs follow PaLM (Chowdhery et al. 2022, appendix B), with causal attention counted once: a
matmul weight costs 2 FLOPs per token forward and 4 backward, and a token attends to half of the
sequence on average.  Recomputation does not count.
"""

from __future__ import annotations

from llamax.config.model import ModelConfig


def flops_per_token(model: ModelConfig, sequence_length: int, adapters: int = 0) -> int:
    """FLOPs of a token, forward and backward: 6 per matmul weight, 6 L S H E of causal attention.

    ``adapters`` is the number of trained weights beside a frozen model, 0 if the model is trained:
    a frozen weight costs 4 FLOPs, because it needs no gradient, and a weight of an adapter 6.
    """
    D, E, heads = model.hidden_size, model.head_dim, model.num_attention_heads
    attention = 2 * D * E * (heads + model.num_key_value_heads)
    layers = model.num_hidden_layers * (attention + 3 * D * model.intermediate_size)
    scores = model.num_hidden_layers * sequence_length * heads * E
    weights = layers + model.vocab_size * D
    return 6 * scores + (4 * weights + 6 * adapters if adapters else 6 * weights)


def mfu(tokens_per_s: float, flops_per_token: float, peak_flops: float) -> float:
    """Model FLOPs utilisation, 0 to 1; 0 where the peak is unknown.

    ``peak_flops`` are FLOP/s of all devices together, 0 where unknown.
    """
    return tokens_per_s * flops_per_token / peak_flops if peak_flops else 0.0
