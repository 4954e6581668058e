"""Reading checkpoints of NeMo and Megatron: one folder per tensor and pipeline rank.

::

    mp_rank_TT/  tp_rank_TT_pp_rank_PPP/  mp_rank_TT_PPP/      each with a .ckpt or .pt file;
                                                               or only that file, for one rank

A rank's folder may hold files of several steps (``NAME--step=1000-....ckpt``); Megatron-LM keeps
each step in a folder of its own (``iter_0001000``).  Layers are numbered from 0 in every stage, and
in every chunk of a stage of an interleaved pipeline (``model0``, ``model1``).  A rank's share of
the fused attention projection is ordered by key/value head: the G query heads that read it, its
key, its value::

    query_key_value (linear_qkv)  =  q0 q1 k0 v0 | q2 q3 k1 v1 | ...
    query, key_value              =  q0 q1 q2 q3 ...  and  k0 v0 | k1 v1 | ...
    dense_h_to_4h   (linear_fc1)  =  gate_r ; up_r          (or up in dense_h_to_4h_2)

Three sets of names are read: those of NeMo's layers, of Megatron core, and of
neuronx-nemo-megatron, which cuts the projections of grouped heads anywhere.  A .nemo file is a tar
archive: unpack it first.

Source: NVIDIA NeMo, ``scripts/checkpoint_converters/convert_llama_hf_to_nemo.py``,
``nemo/utils/model_utils.py`` (inject_model_parallel_rank), ``modules/common/megatron/mlp.py``;
Megatron-LM, ``megatron/training/checkpointing.py``; neuronx-nemo-megatron 2.21,
``checkpoint_conversion/convert_nemo_checkpoint_to_hf_llama.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llamax.checkpoint.formats import torch_zip
from llamax.checkpoint.formats.base import check_inside, find_model_config
from llamax.checkpoint.formats.rank_grid import (
    Location,
    RankGrid,
    all_rows,
    stacked_rows,
    two_halves,
)
from llamax.checkpoint.formats.torch_zip import StoredTensor
from llamax.checkpoint.formats.xser import IGNORED_SUFFIXES, load_file, stored_tensors
from llamax.runtime.errors import CheckpointError
from llamax.runtime.files import plain_file

TRACKER = "latest_checkpointed_iteration.txt"
ITERATION = re.compile(r"iter_(\d{7,})")
STEP = re.compile(r"step=(\d+)")
RANK = re.compile(r"(?:mp_rank_(\d{2,})(?:_(\d{3,}))?|tp_rank_(\d{2,})_pp_rank_(\d{3,}))")
STATED_STEP = ("iteration", "global_step")  # of Megatron-LM and of Lightning, in a rank's file
WRAPPERS = ("model", "module", "language_model")
LAYER_NAME = re.compile(r"(encoder|transformer|decoder)\.layers\.(\d+)\.(.+)")
MODEL_NAMES = {
    "model.embed_tokens.weight": ["embedding.word_embeddings.weight"],
    "model.norm.weight": ["final_layernorm.weight"],
    "lm_head.weight": [
        "output_layer.weight",
        "word_embeddings.weight",
        "word_embeddings_for_head.weight",
    ],
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
    """A folder of rank folders, or with the one file of a single rank.

    ``step``: the one to read where there are several, by default the newest.
    """

    def __init__(self, folder: Path, config: str, optimizer: bool, step: int | None) -> None:
        self.folder = find_iteration(folder, step)
        grid = find_rank_files(self.folder, step if self.folder == folder else None)
        stages = 1 + max(stage for _, stage in grid)
        tensor = 1 + max(rank for rank, _ in grid)
        for stage in range(stages):
            for rank in range(tensor):
                if (rank, stage) not in grid:
                    raise CheckpointError(
                        f"{folder} has no file of tensor rank {rank}, pipeline rank {stage}; copy "
                        "the missing ones"
                    )
        held = {at: load_file(self.folder, path) for at, path in grid.items()}
        check_one_step(self.folder, {grid[at]: values for at, values in held.items()})
        chunks = [
            [chunks_of(held[rank, stage], grid[rank, stage]) for rank in range(tensor)]
            for stage in range(stages)
        ]
        self.origin = described(self.folder, grid[0, 0], step)
        states: list[list[dict[str, StoredTensor]]] = [
            [{} for _ in range(tensor)] for _ in range(stages)
        ]
        count = len(chunks[0][0])
        for ranks in chunks:
            for rank, values in enumerate(ranks):
                if len(values) != count:
                    raise CheckpointError(
                        f"{self.folder}: {len(values)} chunks of layers on tensor rank {rank}, "
                        f"{count} on rank 0; copy the folder again"
                    )
        first = 0
        for chunk in range(count):
            for stage, ranks in enumerate(chunks):
                own = [numbered_from(first, values[chunk]) for values in ranks]
                for state, more in zip(states[stage], own, strict=True):
                    state.update(more)
                layers = (int(n.split(".")[1]) for n in own[0] if n.startswith("layers."))
                first = max(layers, default=first - 1) + 1
        self.states = [[*ranks] for ranks in states]
        self.set_model(find_model_config(self.folder, config))
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
                rows = self._rows_of_group(part)
                yield Location(f"{layer}self_attention.{fused}.weight", rows, joined=True)
            apart = f"{layer}self_attention.{'query' if part == 'q' else 'key_value'}.weight"
            yield Location(apart, all_rows if part == "q" else self._rows_of_pair(part), True)
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

    def _rows_of_pair(self, part: str) -> Callable[[Tensor], Tensor]:
        return lambda joined: joined.unflatten(0, (-1, 2, self.model.head_dim))[
            :, int(part == "v")
        ].flatten(0, 1)


def find_iteration(folder: Path, step: int | None) -> Path:
    """The folder of an iteration in a folder of Megatron-LM, or ``folder`` itself.

    Without ``step`` it is the one that Megatron-LM's tracker file names, or else the newest.
    """
    iterations = {int(m[1]): p for p in folder.iterdir() if (m := ITERATION.fullmatch(p.name))}
    if not iterations and not (folder / TRACKER).is_file():
        return folder
    name = f"iter_{step:07d}" if step is not None else ""
    if not name and (folder / TRACKER).is_file():
        with open(check_inside(folder, folder / TRACKER), "rb", opener=plain_file) as file:
            text = file.read(40).decode(errors="replace").strip()
        name = f"iter_{int(text):07d}" if re.fullmatch(r"[0-9]{1,18}", text) else "release"
    if not name:
        return iterations[max(iterations)]
    if not (folder / name).is_dir():
        steps = ", ".join(map(str, sorted(iterations))) or "none"
        raise CheckpointError(f"{folder} has no folder {name}; its steps are {steps}")
    return folder / name


def find_rank_files(folder: Path, step: int | None = None) -> dict[tuple[int, int], Path]:
    """The file of every (tensor, pipeline) rank, all of one step.

    Raises CheckpointError if a folder has no such file, or several of which none is the right one.
    """
    if any(folder.glob("*.distcp")) or (folder / "weights").is_dir():
        raise CheckpointError(
            f"{folder} is in the format of torch.distributed.checkpoint, which llamax does not "
            "read; convert it with Megatron-LM's --ckpt-convert-format torch, or with NeMo's "
            "export to Hugging Face"
        )
    ranks = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (match := RANK.fullmatch(path.name)):
            rank, stage = (int(n) for n in (match[1] or match[3], match[2] or match[4] or 0))
            ranks[rank, stage] = files_by_step(path)
    ranks = ranks or {(0, 0): files_by_step(folder)}
    steps = set.intersection(*(set(files) for files in ranks.values()))
    if len(steps) == 1 and None in steps:
        return {rank: files[None] for rank, files in ranks.items()}
    numbers = sorted(number for number in steps if number is not None)
    wanted = step if step is not None else max(numbers, default=None)
    if wanted is None or wanted not in numbers:
        missing = "no step in common" if step is None else f"no step {step} on every rank"
        raise CheckpointError(
            f"{folder} has {missing}; every rank has {', '.join(map(str, numbers)) or 'none'}"
        )
    return {rank: files[wanted] for rank, files in ranks.items()}


def files_by_step(folder: Path) -> dict[int | None, Path]:
    """The model's files in a rank's folder by step; the key is None for a file without a number."""
    steps: dict[int | None, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".ckpt", ".pt") and path.name != "distrib_optim.pt":
            number = STEP.search(path.name)
            steps.setdefault(int(number[1]) if number else None, []).append(path)
    if len(steps) > 1:
        steps.pop(None, None)  # such as last.ckpt, the copy of a numbered file
    chosen: dict[int | None, Path] = {}
    for step, paths in steps.items():
        others = [path for path in paths if not path.stem.endswith(("-last", "-optimizer_states"))]
        if len(others or paths) > 1:
            raise CheckpointError(
                f"{folder} has {len(paths)} files *.ckpt or *.pt"
                + ("" if step is None else f" of step {step}")
                + ", exactly one is needed: "
                + ", ".join(path.name for path in paths[:4])
            )
        chosen[step] = (others or paths)[0]
    if not chosen:
        raise CheckpointError(f"{folder} has 0 files *.ckpt or *.pt, exactly one is needed")
    return chosen


def described(folder: Path, path: Path, step: int | None) -> str:
    """The step and file that were taken; CheckpointError if ``step`` is another one."""
    number = STEP.search(path.name) or ITERATION.fullmatch(folder.name)
    if step is not None and (number is None or int(number[1]) != step):
        raise CheckpointError(
            f"{path} is not of step {step} by its name; leave `step` out to take it"
        )
    relative = path.relative_to(folder.parent if ITERATION.fullmatch(folder.name) else folder)
    return f"step {number[1].lstrip('0') or '0'} ({relative})" if number else str(relative)


def check_one_step(folder: Path, held: Mapping[Path, Mapping[Any, Any]]) -> None:
    """Raise CheckpointError if files of ranks, by their paths, say that they are of other steps."""
    known: dict[int, Path] = {}
    for path, values in held.items():
        stated = next((values[key] for key in STATED_STEP if key in values), None)
        if type(stated) is int:
            known.setdefault(stated, path)
    if len(known) > 1:
        (first, one), (second, other), *_ = sorted(known.items())
        raise CheckpointError(
            f"{folder}: {one.relative_to(folder)} is of step {first} and "
            f"{other.relative_to(folder)} of step {second}; copy all files of one step"
        )


def chunks_of(values: Mapping[Any, Any], path: Path) -> list[Mapping[str, StoredTensor]]:
    """The tensors in a rank's file, one dict for each chunk of an interleaved pipeline."""
    names = [f"model{number}" for number in range(len(values)) if f"model{number}" in values]
    if not names:
        names = [name for name in ("state_dict", "model") if name in values][:1]
    chunks = [values[name] for name in names] or [values]
    if "model0" in names and isinstance(values.get("state_dict"), dict):
        chunks[-1] = chunks[-1] | values["state_dict"]  # what belongs to no layer
    return [dict(stored_tensors(torch_zip.as_dict(chunk, path), path)) for chunk in chunks]


def numbered_from(first: int, values: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors without wrapper names; layer 0 of the chunk is layer ``first`` of the model."""
    renamed: dict[str, StoredTensor] = {}
    for name, tensor in values.items():
        while name.partition(".")[0] in WRAPPERS:
            name = name.partition(".")[2]
        if match := LAYER_NAME.fullmatch(name):
            name = f"layers.{first + int(match[2])}.{match[3]}"
        elif name.partition(".")[0] in ("encoder", "transformer", "decoder"):
            name = name.partition(".")[2]
        if not name.endswith(IGNORED_SUFFIXES):
            renamed[name] = tensor
    return renamed
