"""The type of a table of cases, and changes that several begin with."""

from __future__ import annotations

from typing import Any

# rule: (changes, world, problem) that trips it; then (changes, world) on the edge that keeps it
# (world: ranks, or ranks and those of a node)
Worlds = int | tuple[int, int] | None
Cases = dict[str, tuple[list[tuple[dict[str, Any], Worlds, str]], list[dict[str, Any]]]]

# Changes that several cases begin with: adapters, and a model whose state is in 8 bits.
LORA = {"finetune.method": "lora", "checkpoint.init_from": "base"}

BLOCKS = {
    "optim.state_bits": 8,
    "parallel.tensor": 2,
    "model.hidden_size": 64,
    "model.intermediate_size": 512,
    "model.num_attention_heads": 8,
    "model.num_key_value_heads": 2,
    "model.head_dim": 64,
}
