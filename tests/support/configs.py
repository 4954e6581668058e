"""A configuration that breaks no rule, and changes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llamax.config.model import RopeScaling
from llamax.config.schema import (
    Config,
    DataConfig,
    OptimConfig,
    ParallelConfig,
)
from support.models import tiny

# Room for tensor degrees up to 8, and Llama 3.1's scaling.
MODEL = tiny(
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=101,
    max_position_embeddings=2048,
    initializer_range=0.02,
    rope_scaling=RopeScaling(),
)


GOOD = Config(
    MODEL,
    ParallelConfig(tensor=2),
    OptimConfig(warmup_steps=10),
    DataConfig(sequence_length=128, global_batch=8, micro_batch=2),
)


def changed(changes: dict[str, Any], base: Config = GOOD) -> Config:
    """``base`` with ``section.key`` replaced."""
    for key, value in changes.items():
        *path, name = key.split(".")
        parts = [base]
        for part in path:
            parts.append(getattr(parts[-1], part))
        built = replace(parts[-1], **{name: value})
        for owner, part in zip(reversed(parts[:-1]), reversed(path), strict=True):
            built = replace(owner, **{part: built})
        base = built
    return base
