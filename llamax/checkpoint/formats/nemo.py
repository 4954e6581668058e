"""Reading NeMo and Megatron: one folder per tensor and pipeline rank.

::

    mp_rank_TT/  tp_rank_TT_pp_rank_PPP/  mp_rank_TT_PPP/      with one .ckpt or .pt each,
                                                               or that one file alone

Layers are numbered from 0 in every stage.  A rank's share of the fused attention projection goes by
groups: the G queries that read a key/value head, that head's key, its value::

    query_key_value (linear_qkv)  =  q0 q1 k0 v0 | q2 q3 k1 v1 | ...
    dense_h_to_4h   (linear_fc1)  =  gate_r ; up_r          (or up in dense_h_to_4h_2)

Both spellings are read, NeMo's own layers and Megatron core's.  A .nemo file is a tar archive:
unpack it first.

Source: NVIDIA NeMo, ``scripts/checkpoint_converters/convert_llama_hf_to_nemo.py``,
``nemo/utils/model_utils.py`` (inject_model_parallel_rank), ``modules/common/megatron/mlp.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llamax.checkpoint.formats import torch_zip
from llamax.checkpoint.formats.base import inside, model_of
from llamax.checkpoint.formats.rank_grid import (
    IGNORED,
    Grid,
    State,
    Where,
    all_rows,
    halves,
    stacked,
)
from llamax.checkpoint.formats.torch_zip import Stored
from llamax.runtime.errors import CheckpointError

RANK = re.compile(r"(?:mp_rank_(\d{2,})(?:_(\d{3,}))?|tp_rank_(\d{2,})_pp_rank_(\d{3,}))")
OUTER = ("model", "module", "language_model")
LAYER = re.compile(r"(encoder|transformer|decoder)\.layers\.(\d+)\.(.+)")
PLAIN = {
    "model.embed_tokens.weight": ["embedding.word_embeddings.weight"],
    "model.norm.weight": ["final_layernorm.weight"],
    "lm_head.weight": ["output_layer.weight"],
}
LEAVES = {
    "self_attn.o_proj.weight": ["self_attention.dense.weight", "self_attention.linear_proj.weight"],
    "mlp.down_proj.weight": ["mlp.dense_4h_to_h.weight", "mlp.linear_fc2.weight"],
    "input_layernorm.weight": [
        "input_layernorm.weight",
        "self_attention.linear_qkv.layer_norm_weight",
    ],
    "post_attention_layernorm.weight": [
        "post_attention_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight",
    ],
}


class Nemo(Grid):
    """A folder of rank folders, or of one file."""

    def __init__(self, folder: Path, config: str, optimizer: bool = False) -> None:
        self.folder = folder
        found = rank_files(folder)
        stages = 1 + max(stage for _, stage in found)
        tensor = 1 + max(rank for rank, _ in found)
        for stage in range(stages):
            for rank in range(tensor):
                if (rank, stage) not in found:
                    raise CheckpointError(
                        f"{folder} has no file of tensor rank {rank}, pipeline rank {stage}; copy "
                        "the missing ones"
                    )
        self.states, first = [], 0
        for stage in range(stages):
            ranks = [weights(folder, found[rank, stage], first) for rank in range(tensor)]
            self.states.append(ranks)
            own = {int(name.split(".")[1]) for name in ranks[0] if name.startswith("layers.")}
            first = max(own, default=first - 1) + 1
        self.lay_out(model_of(folder, config))
        self.nothing_left()

    def places(self, name: str) -> Iterator[Where]:
        for plain in PLAIN.get(name, ()):
            yield Where(plain, all_rows)
        _, _, rest = name.partition("model.layers.")
        number, _, leaf = rest.partition(".")
        layer = f"layers.{number}."
        for plain in LEAVES.get(leaf, ()):
            yield Where(layer + plain, all_rows)
        part = leaf.removeprefix("self_attn.").removeprefix("mlp.").removesuffix("_proj.weight")
        if part in ("q", "k", "v"):
            for fused in ("query_key_value", "linear_qkv"):
                yield Where(f"{layer}self_attention.{fused}.weight", self._of_group(part))
        if part in ("gate", "up"):
            half = stacked(halves, ("gate", "up").index(part))
            alone = f"{layer}mlp.dense_h_to_4h_2.weight"
            if any(alone in ranks[0] for ranks in self.states):
                yield Where(alone if part == "up" else alone.replace("_2.", "."), all_rows)
            else:
                yield Where(f"{layer}mlp.dense_h_to_4h.weight", half)
            yield Where(f"{layer}mlp.linear_fc1.weight", half)

    def _of_group(self, part: str) -> Callable[[Tensor], Tensor]:
        group = self.model.num_attention_heads // self.model.num_key_value_heads
        heads = slice(0, group) if part == "q" else slice(group + (part == "v"), None)

        def rows(share: Tensor) -> Tensor:
            groups: Tensor = share.unflatten(0, (-1, group + 2, self.model.head_dim))
            return groups[:, heads][:, : group if part == "q" else 1].flatten(0, 2)

        return rows


def rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    """The file of every (tensor, pipeline) rank."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (match := RANK.fullmatch(path.name)):
            rank, stage = (int(n) for n in (match[1] or match[3], match[2] or match[4] or 0))
            found[rank, stage] = one_file(path)
    return found or {(0, 0): one_file(folder)}


def one_file(folder: Path) -> Path:
    """The only pickle of a folder."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".ckpt", ".pt")]
    if len(files) != 1:
        raise CheckpointError(
            f"{folder} has {len(files)} files *.ckpt or *.pt, one is needed"
            + "".join(f"; {path.name}" for path in files[:4])
        )
    return files[0]


def weights(folder: Path, path: Path, first: int) -> State:
    """The tensors of a rank, outer names taken off; its layer 0 is layer ``first`` of the model."""
    held: Mapping[Any, Any] = torch_zip.mapping(torch_zip.load(inside(folder, path)), path)
    for wrapper in ("state_dict", "model"):
        if isinstance(held.get(wrapper), dict):
            held = held[wrapper]
            break
    found: dict[str, Stored] = {}
    for name, tensor in flattened(held):
        while name.partition(".")[0] in OUTER:
            name = name.partition(".")[2]
        if match := LAYER.fullmatch(name):
            name = f"layers.{first + int(match[2])}.{match[3]}"
        elif name.partition(".")[0] in ("encoder", "transformer", "decoder"):
            name = name.partition(".")[2]
        if not name.endswith(IGNORED):
            found[name] = tensor
    return found


def flattened(held: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Stored]]:
    """The tensors of dicts in dicts, their keys joined by dots."""
    for key, value in held.items():
        if isinstance(value, Stored):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from flattened(value, f"{prefix}{key}.")
