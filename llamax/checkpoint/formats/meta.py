"""Reading the releases of Meta: consolidated.XX.pth, one per tensor rank, and params.json.

The matrices equal those of the Hub, under other names, except queries and keys: the rotary
embedding of Meta rotates neighbouring features, that of the Hub features i and i + E / 2.  So the
rows of a head are ordered differently::

    Meta   0 0' 1 1' 2 2' ...          head of E rows, pairs (i, i')
    Hub    0 1 2 ... 0' 1' 2' ...

Llama 1 and 2 cut the embedding along its features, Llama 3 along the vocabulary; the shapes show
which.

Source: meta-llama/llama, ``llama/model.py``; transformers, ``convert_llama_weights_to_hf.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from llamax.checkpoint.formats.base import (
    find_model_config,
    read_json_inside,
)
from llamax.checkpoint.formats.rank_grid import (
    Location,
    RankGrid,
    StateDict,
    all_rows,
)
from llamax.checkpoint.formats.xser import load_file, stored_tensors
from llamax.config.model import ModelConfig
from llamax.parallel.sharding import Shard
from llamax.runtime.errors import CheckpointError, ConfigError

PARAMS_JSON = "params.json"
RANK_FILE = re.compile(r"consolidated\.(\d{2,})\.pth")
MODEL_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}
REQUIRED_PARAMS = ("dim", "n_layers", "n_heads")


class MetaCheckpoint(RankGrid):
    """A folder with params.json and one or more consolidated.XX.pth."""

    def __init__(self, folder: Path, config: str, optimizer: bool, step: int | None) -> None:
        if step is not None:
            raise ConfigError(f"`step={step}`: the format of Meta has no steps; leave it out")
        self.folder = folder
        numbers = {int(m[1]): p for p in folder.iterdir() if (m := RANK_FILE.fullmatch(p.name))}
        if sorted(numbers) != [*range(len(numbers))] or not numbers:
            raise CheckpointError(
                f"{folder} has the files consolidated.XX.pth of ranks {sorted(numbers)}; they must "
                "count from 00 without a gap"
            )
        self.states = [[load_state_dict(folder, numbers[rank]) for rank in sorted(numbers)]]
        self.set_model(find_model_config(folder, config) if config else self._model())
        self.check_all_used()

    def locations(self, name: str) -> Iterator[Location]:
        yield Location(meta_name(name), all_rows)

    def cut_dim(self, name: str, how: Shard) -> int:
        by_features = (
            name == "model.embed_tokens.weight"
            and self.states[0][0]["tok_embeddings.weight"].shape[-1] != self.model.hidden_size
        )
        return 1 if by_features else how.dim

    def join(self, name: str, kind: str) -> Tensor:
        joined = super().join(name, kind)
        if heads := rotated_heads(self.model, name):
            return to_halves(joined, heads)
        return joined

    def _model(self) -> ModelConfig:
        params = read_json_inside(self.folder, self.folder / PARAMS_JSON)
        for key in REQUIRED_PARAMS:
            if type(params.get(key)) is not int:
                raise ConfigError(
                    f"{self.folder / PARAMS_JSON}: {key} is {params.get(key)!r}, not a number"
                )
        if params.get("use_scaled_rope"):
            raise ConfigError(
                f"{self.folder / PARAMS_JSON} says use_scaled_rope, but not by how much; add "
                "`config` with the model's recipe (llama3.1-8b, llama3.2-1b, ...) or config.json"
            )
        ranks, first = len(self.states[0]), self.states[0][0]
        for needed in ("output.weight", "layers.0.feed_forward.w1.weight"):
            if needed not in first or len(first[needed].shape) != 2:
                raise CheckpointError(
                    f"{self.folder} has no {needed}: it is not a Llama released by Meta"
                )
        vocabulary = first["output.weight"].shape[0] * ranks
        newer = vocabulary > 100_000
        eps = params.get("norm_eps", 1e-5)
        heads = params["n_heads"]
        return ModelConfig.from_hub(
            {
                "model_type": "llama",
                "hidden_size": params["dim"],
                "intermediate_size": first["layers.0.feed_forward.w1.weight"].shape[0] * ranks,
                "num_hidden_layers": params["n_layers"],
                "num_attention_heads": heads,
                "num_key_value_heads": params.get("n_kv_heads") or heads,
                "vocab_size": vocabulary,
                "rms_norm_eps": eps,
                "rope_theta": params.get("rope_theta", 10_000.0),
                "max_position_embeddings": 8192 if newer else 4096 if eps == 1e-5 else 2048,
                "bos_token_id": 128_000 if newer else 1,
                "eos_token_id": 128_001 if newer else 2,
            }
        )


def meta_name(name: str) -> str:
    """The name of a Hub tensor in files of Meta."""
    _, _, rest = name.partition("model.layers.")
    number, _, leaf = rest.partition(".")
    return f"layers.{number}.{LAYER_NAMES[leaf]}" if leaf else MODEL_NAMES[name]


def rotated_heads(model: ModelConfig, name: str) -> int:
    """The number of heads of a query or key projection, which have rotary positions; else 0."""
    if name.endswith(".q_proj.weight"):
        return model.num_attention_heads
    return model.num_key_value_heads if name.endswith(".k_proj.weight") else 0


def to_halves(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows from the pairs of Meta to the halves of the Hub: [H * E, D] -> [H * E, D]."""
    width = rows.shape[0] // heads
    return rows.reshape(heads, width // 2, 2, -1).transpose(1, 2).reshape(rows.shape)


def to_pairs(rows: Tensor, heads: int) -> Tensor:
    """The inverse of ``to_halves``."""
    width = rows.shape[0] // heads
    return rows.reshape(heads, 2, width // 2, -1).transpose(1, 2).reshape(rows.shape)


def load_state_dict(folder: Path, path: Path) -> StateDict:
    """The tensors of a rank by their names in files of Meta."""
    return dict(stored_tensors(load_file(folder, path), path))
