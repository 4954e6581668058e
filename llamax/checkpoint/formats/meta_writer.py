"""Writing in the format of Meta: consolidated.XX.pth with rows in Meta's order, and params.json.

params.json says that the rotary embedding is scaled, not by how much: Meta's reference
implementation fixes the factor at 8 (Llama 3.1), while the 1B and 3B models of Llama 3.2 have 32.
"""

from __future__ import annotations

import json
from math import gcd
from pathlib import Path
from typing import Any

from torch import Tensor

from llamax.checkpoint.formats.meta import (
    PARAMS_JSON,
    meta_name,
    rotated_heads,
    to_pairs,
)
from llamax.checkpoint.formats.torch_save import save_text, save_torch
from llamax.checkpoint.safetensors_io import Progress, Started, no_progress, no_start
from llamax.checkpoint.source import Source
from llamax.config.model import ModelConfig, RopeScaling
from llamax.config.rules import divisors
from llamax.model.llama import Llama
from llamax.parallel.sharding import Replica
from llamax.runtime.errors import ConfigError, join_or
from llamax.runtime.logging import logger

REFERENCE_FACTOR = 8.0  # of the rope scaling, a constant in Meta's llama/model.py
SCALINGS = (RopeScaling(factor=REFERENCE_FACTOR), RopeScaling(factor=32.0))


def write_meta(
    source: Source,
    model: ModelConfig,
    folder: Path,
    tensor: int = 1,
    *,
    started: Started = no_start,
    progress: Progress = no_progress,
) -> None:
    """Fill ``folder`` with ``tensor`` files, each with one rank's share of every tensor.

    ``started`` is called with the number of shares, ``progress`` for each.

    Warns if Meta's reference implementation computes the model with another rope scaling.  Raises
    ConfigError, before anything is written, if ``tensor`` does not divide the model or params.json
    cannot describe it.
    """
    text = json.dumps(params_of(model), indent=2) + "\n"
    sizes = {
        "num_key_value_heads": model.num_key_value_heads,
        "intermediate_size": model.intermediate_size,
        "vocab_size": model.vocab_size,
    }
    for what, size in sizes.items():
        if tensor < 1 or size % tensor:
            fits = join_or(divisors(gcd(*sizes.values())))
            raise ConfigError(f"`tensor={tensor}` does not divide {what}={size}; use {fits}")
    if model.rope_scaling and model.rope_scaling.factor != REFERENCE_FACTOR:
        logger.warning(
            "Meta's reference implementation fixes the rope scaling factor at %g, this model's is "
            "%g, which params.json cannot state: change the factor in its code",
            REFERENCE_FACTOR,
            model.rope_scaling.factor,
        )
    cuts = Llama(model, device="meta").sharded_parameters().hub_cuts()
    started(len(cuts) * tensor, "tensor")
    for rank in range(tensor):
        state: dict[str, Any] = {}
        for name, how in cuts.items():
            dim = 0 if isinstance(how, Replica) else how.dim
            if name == "model.embed_tokens.weight" and model.vocab_size < 100_000:
                dim = 1  # Llama 1 and 2
            whole = meta_row_order(source.read(name), model, name)
            share = whole if isinstance(how, Replica) else whole.chunk(tensor, dim)[rank]
            state[meta_name(name)] = share.clone()
            progress(1)
        if model.tie_word_embeddings:
            state["output.weight"] = source.read("model.embed_tokens.weight").chunk(tensor)[rank]
        save_torch(folder / f"consolidated.{rank:02d}.pth", state)
    save_text(folder / PARAMS_JSON, text)


def meta_row_order(whole: Tensor, model: ModelConfig, name: str) -> Tensor:
    """A Hub tensor with the rows of queries and keys in Meta's order; others unchanged."""
    heads = rotated_heads(model, name)
    return to_pairs(whole, heads) if heads else whole


def params_of(model: ModelConfig) -> dict[str, Any]:
    """The params.json of a model; ConfigError if Meta's code would build another model from it."""
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        raise ConfigError(
            f"Meta's Llama needs head_dim = hidden_size / num_attention_heads, the model has "
            f"head_dim={model.head_dim}"
        )
    if model.rope_scaling not in (None, *SCALINGS):
        raise ConfigError(f"Meta's Llama does not know this rope_scaling: {model.rope_scaling}")
    multiple, factor = feed_forward_params(model.hidden_size, model.intermediate_size)
    return {
        "dim": model.hidden_size,
        "n_layers": model.num_hidden_layers,
        "n_heads": model.num_attention_heads,
        "n_kv_heads": model.num_key_value_heads,
        "vocab_size": model.vocab_size,
        "multiple_of": multiple,
        **({} if factor is None else {"ffn_dim_multiplier": factor}),
        "norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        **({"use_scaled_rope": True} if model.rope_scaling else {}),
    }


def feed_forward_params(width: int, wanted: int) -> tuple[int, float | None]:
    """(multiple_of, ffn_dim_multiplier) from which Meta's code computes ``wanted`` features.

    It computes ffn_dim_multiplier * 8 / 3 * width, rounded up to a multiple of multiple_of.
    """
    plain = int(8 * width / 3)
    for multiple in (256, 1024, 4096):
        if -(-plain // multiple) * multiple == wanted:
            return multiple, None
    multiple = min(wanted & -wanted, 1024)
    return multiple, (wanted - (0.5 if multiple > 1 else -0.5)) / plain
