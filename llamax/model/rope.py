"""Rotary position embedding: the frequencies of a model and the tables of cosines and sines.

Sources: Su et al. 2021, section 3.4; Llama 3 (Grattafiori et al. 2024), with the scaling of
transformers' "llama3".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llamax.config.model import RopeScaling


def inverse_frequencies(head_dim: int, rope_theta: float, scaling: RopeScaling | None) -> Tensor:
    """The rotary frequency of every pair of features, in radians per position: [E / 2], fp32.

    ``scaling`` stretches them for long contexts ("rope_type": "llama3"): wavelengths below
    ``original / high`` stay, frequencies of wavelengths above ``original / low`` are divided by
    ``factor``, and those in between are interpolated.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / rope_theta**exponents
    if scaling is None:
        return frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rope_tables(positions: Tensor, inverse_frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, repeated once: [B, S], [E / 2] -> 2 x [B, S, E], fp32.

    Positions that are the same for all sequences may be given once, as [1, S].
    """
    angles = positions[..., None].float() * inverse_frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()
