"""Reading checkpoints of NeMo and Megatron: one folder per tensor and pipeline rank.

::

    mp_rank_TT/  tp_rank_TT_pp_rank_PPP/  mp_rank_TT_PPP/      each with one .ckpt or .pt file;
                                                               or only that file, for one rank

Layers are numbered from 0 in every stage.  A rank's share of the fused attention projection is
ordered by key/value head: the G query heads that read it, its key, its value::

    query_key_value (linear_qkv)  =  q0 q1 k0 v0 | q2 q3 k1 v1 | ...
    dense_h_to_4h   (linear_fc1)  =  gate_r ; up_r          (or up in dense_h_to_4h_2)

Both names are read, those of NeMo's layers and those of Megatron core.  A .nemo file is a tar
archive: unpack it first.

Source: NVIDIA NeMo, ``scripts/checkpoint_converters/convert_llama_hf_to_nemo.py``,
``nemo/utils/model_utils.py`` (inject_model_parallel_rank), ``modules/common/megatron/mlp.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from llamax.checkpoint.formats.base import find_model_config
from llamax.checkpoint.formats.rank_grid import (
    Location,
    RankGrid,
    StateDict,
    all_rows,
    stacked_rows,
    two_halves,
)
from llamax.checkpoint.formats.torch_zip import StoredTensor
from llamax.checkpoint.formats.xser import IGNORED_SUFFIXES, load_file, stored_tensors
from llamax.runtime.errors import CheckpointError

RANK = re.compile(r"(?:mp_rank_(\d{2,})(?:_(\d{3,}))?|tp_rank_(\d{2,})_pp_rank_(\d{3,}))")
WRAPPERS = ("model", "module", "language_model")
LAYER_NAME = re.compile(r"(encoder|transformer|decoder)\.layers\.(\d+)\.(.+)")
MODEL_NAMES = {
    "model.embed_tokens.weight": ["embedding.word_embeddings.weight"],
    "model.norm.weight": ["final_layernorm.weight"],
    "lm_head.weight": ["output_layer.weight"],
}
LAYER_NAMES = {
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


class NemoCheckpoint(RankGrid):
    """A folder of rank folders, or with the one file of a single rank."""

    def __init__(self, folder: Path, config: str, optimizer: bool = False) -> None:
        self.folder = folder
        found = find_rank_files(folder)
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
            ranks = [load_state_dict(folder, found[rank, stage], first) for rank in range(tensor)]
            self.states.append(ranks)
            own = {int(name.split(".")[1]) for name in ranks[0] if name.startswith("layers.")}
            first = max(own, default=first - 1) + 1
        self.set_model(find_model_config(folder, config))
        self.check_all_used()

    def locations(self, name: str) -> Iterator[Location]:
        for plain in MODEL_NAMES.get(name, ()):
            yield Location(plain, all_rows)
        _, _, rest = name.partition("model.layers.")
        number, _, leaf = rest.partition(".")
        layer = f"layers.{number}."
        for plain in LAYER_NAMES.get(leaf, ()):
            yield Location(layer + plain, all_rows)
        part = leaf.removeprefix("self_attn.").removeprefix("mlp.").removesuffix("_proj.weight")
        if part in ("q", "k", "v"):
            for fused in ("query_key_value", "linear_qkv"):
                yield Location(f"{layer}self_attention.{fused}.weight", self._rows_of_group(part))
        if part in ("gate", "up"):
            half = stacked_rows(two_halves, ("gate", "up").index(part))
            alone = f"{layer}mlp.dense_h_to_4h_2.weight"
            if any(alone in ranks[0] for ranks in self.states):
                yield Location(alone if part == "up" else alone.replace("_2.", "."), all_rows)
            else:
                yield Location(f"{layer}mlp.dense_h_to_4h.weight", half)
            yield Location(f"{layer}mlp.linear_fc1.weight", half)

    def _rows_of_group(self, part: str) -> Callable[[Tensor], Tensor]:
        group = self.model.num_attention_heads // self.model.num_key_value_heads
        heads = slice(0, group) if part == "q" else slice(group + (part == "v"), None)

        def rows(share: Tensor) -> Tensor:
            groups: Tensor = share.unflatten(0, (-1, group + 2, self.model.head_dim))
            return groups[:, heads][:, : group if part == "q" else 1].flatten(0, 2)

        return rows


def find_rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    """The file of every (tensor, pipeline) rank; CheckpointError if a folder has not one file."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (match := RANK.fullmatch(path.name)):
            rank, stage = (int(n) for n in (match[1] or match[3], match[2] or match[4] or 0))
            found[rank, stage] = only_file(path)
    return found or {(0, 0): only_file(folder)}


def only_file(folder: Path) -> Path:
    """The only .ckpt or .pt file of a folder; CheckpointError if there is none or several."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".ckpt", ".pt")]
    if len(files) != 1:
        raise CheckpointError(
            f"{folder} has {len(files)} files *.ckpt or *.pt, exactly one is needed"
            + "".join(f"; {path.name}" for path in files[:4])
        )
    return files[0]


def load_state_dict(folder: Path, path: Path, first: int) -> StateDict:
    """The tensors of a rank, without wrapper names; its layer 0 is layer ``first`` of the model."""
    values = load_file(folder, path)
    for wrapper in ("state_dict", "model"):
        if isinstance(values.get(wrapper), dict):
            values = values[wrapper]
            break
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored_tensors(values, path):
        while name.partition(".")[0] in WRAPPERS:
            name = name.partition(".")[2]
        if match := LAYER_NAME.fullmatch(name):
            name = f"layers.{first + int(match[2])}.{match[3]}"
        elif name.partition(".")[0] in ("encoder", "transformer", "decoder"):
            name = name.partition(".")[2]
        if not name.endswith(IGNORED_SUFFIXES):
            found[name] = tensor
    return found
