"""Reading neuronx-distributed: what its ``save_checkpoint`` leaves in a folder.

::

    tag/done                                            written last
    tag/model/dp_rank_00_tp_rank_TT_pp_rank_PP.pt       a rank's state dict
    tag/optim/dp_rank_DD_tp_rank_TT_pp_rank_PP.pt       ZeRO-1: a data rank's rows of every state
        base_state[i] = {step, exp_avg, exp_avg_sq}, sharded_master_weights[i], shape_info[i]

With torch-xla's serialization ("xser") tensor i lies in ``X.pt.tensors/tensor_i.pt`` instead, and
``X.pt.info.pt`` gives dtypes and shapes; weights may then be left out for the masters' sake.

A rank's share of a fused projection stacks its parts: ``qkv_proj.weight`` (or ``weight_qkv``) is
[q_r; k_r; v_r], ``gate_up_proj`` is [gate_r; up_r].  States are numbered in the order of the
optimizer's groups: all parameters, or first those with weight decay, then norms.  Each state is cut
by rows over the data ranks, after rows of zeros that make them divide.

Source: neuronx_distributed 0.17, ``trainer/checkpoint.py``, ``modules/qkv_linear.py``; torch_xla
2.9, ``distributed/zero_redundancy_optimizer.py``, ``utils/serialization.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamax.checkpoint.formats import torch_pickle, torch_zip
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

RANK = re.compile(r"dp_rank_(\d{2,})_tp_rank_(\d{2,})_pp_rank_(\d{2,})\.pt")
MOMENTS = ("exp_avg", "exp_avg_sq")
ABSENT = -1  # the offset of a weight that was left out


class Nxd(Grid):
    """A tag's folder, or a folder of tags: then the newest that was finished."""

    repeats_heads = True

    def __init__(self, folder: Path, config: str, optimizer: bool = True) -> None:
        self.folder = tag_of(folder)
        found = ranks_of(self.folder / "model")
        self.states = [
            [weights(self.folder, found[0, rank, stage]) for rank in range(found.tensor)]
            for stage in range(found.stages)
        ]
        self.lay_out(model_of(self.folder, config))
        self.optimizer: list[list[list[Mapping[Any, Any]]]] = []
        if optimizer and (self.folder / "optim").is_dir():
            self._open_optimizer(ranks_of(self.folder / "optim"))
        elif self._absent():
            raise CheckpointError(
                f"{self.folder} left its weights out for the masters of the optimizer; import it "
                "with its optim folder"
            )
        self.nothing_left()

    def places(self, name: str) -> Iterator[Where]:
        layer, attention, leaf = name.partition(".self_attn.")
        part = leaf[0] if leaf.startswith(("q_", "k_", "v_")) else ""
        if part:
            fused = f"{layer}{attention}qkv_proj"
            rows = stacked(self._qkv, "qkv".index(part))
            yield Where(f"{fused}.weight_{part}", all_rows)
            yield Where(f"{fused}.weight_qkv", rows)
            yield Where(f"{fused}.weight", rows)
        owner, _, leaf = name.rpartition(".mlp.")
        if leaf in ("gate_proj.weight", "up_proj.weight"):
            part = leaf.partition("_")[0]
            rows = stacked(halves, ("gate", "up").index(part))
            yield Where(f"{owner}.mlp.gate_up_proj.weight", rows)
        yield Where(name, all_rows)

    def dtype(self, name: str, kind: str = "weight") -> torch.dtype:
        stage, where = self.find(name)
        if kind == "weight":
            return self.states[stage][0][where.name].dtype
        return self._pieces(stage, 0, where.name, kind)[0].dtype

    def share(self, stage: int, rank: int, name: str, kind: str) -> Tensor:
        weight = self.states[stage][rank][name]
        if kind == "weight" and weight.offset != ABSENT:
            return weight.load()
        pieces = self._pieces(stage, rank, name, "master" if kind == "weight" else kind)
        rows = torch.empty(0)
        if len({piece.shape[1:] for piece in pieces}) == 1:
            rows = torch.cat([piece.load() for piece in pieces])[: weight.shape[0]]
        if tuple(rows.shape) != weight.shape:
            raise CheckpointError(
                f"{self.folder}: {kind} of {name} is {list(rows.shape)} on tensor rank {rank}, "
                f"its weight {list(weight.shape)}; copy the folder anew"
            )
        return rows.to(weight.dtype) if kind == "weight" else rows

    def _qkv(self, rows: int) -> list[int]:
        queries = self.model.num_attention_heads * self.model.head_dim // self.tensor_degree
        return [queries, *halves(max(rows - queries, 0))]

    def _absent(self) -> bool:
        return any(s.offset == ABSENT for ranks in self.states for r in ranks for s in r.values())

    # --- optimizer -------------------------------------------------------------------------------

    def _open_optimizer(self, found: Ranks) -> None:
        if (found.tensor, found.stages) != (self.tensor_degree, len(self.states)):
            raise CheckpointError(
                f"{self.folder}: its optimizer has {found.tensor} tensor ranks and "
                f"{found.stages} stages, its model {self.tensor_degree} and {len(self.states)}"
            )
        self.optimizer = [
            [
                [opened(self.folder, found[data, rank, stage]) for data in range(found.data)]
                for rank in range(found.tensor)
            ]
            for stage in range(found.stages)
        ]
        first = self.optimizer[0][0][0]
        masters = isinstance(first.get("sharded_master_weights"), dict)
        self.kinds = ("weight", *(["master"] if masters else []), *MOMENTS)
        try:
            self.index = [self._numbers(stage) for stage in range(found.stages)]
            step = entry(first, _states(first), 0).get("step", 0)
            self.step = int(step.load().item() if isinstance(step, Stored) else step)
        except (TypeError, ValueError, AttributeError, RuntimeError, OverflowError):
            raise CheckpointError(
                f"{self.folder}: its optimizer state is not NxD's; use `weights_only=True`"
            ) from None

    def _numbers(self, stage: int) -> dict[str, int]:
        """The number of every parameter's state, checked against the shapes that are kept."""
        held, state = self.optimizer[stage][0][0], self.states[stage][0]
        names = [name for name in state if not name.endswith(IGNORED)]
        if self.model.tie_word_embeddings:
            names = [name for name in names if name != "lm_head.weight"]
        groups = [group.get("params") for group in held.get("param_groups", ())]
        norms = [name for name in names if "norm" in name]
        ordered = names if len(groups) < 2 else [n for n in names if n not in norms] + norms
        numbers = [number for group in groups for number in group]
        if len(groups) > 2 or numbers != [*range(len(names))]:
            raise CheckpointError(
                f"{self.folder}: its optimizer has {len(groups)} groups of "
                f"{len(numbers)} parameters, not one, or one with decay and one without, of "
                f"{len(names)}; `weights_only=True` leaves it out"
            )
        for number, name in enumerate(ordered):
            shape = held.get("shape_info", {}).get(number, state[name].shape)
            if tuple(shape) != state[name].shape:
                raise CheckpointError(
                    f"{self.folder}: state {number} of the optimizer is {list(shape)}, "
                    f"{name} is {list(state[name].shape)}; `weights_only=True` leaves it out"
                )
        return {name: number for number, name in enumerate(ordered)}

    def _pieces(self, stage: int, rank: int, name: str, kind: str) -> list[Stored]:
        """One kind of a rank's parameter, by data rank."""
        number, found = self.index[stage][name], []
        for held in self.optimizer[stage][rank]:
            if kind == "master":
                masters = held.get("sharded_master_weights")
                piece = masters.get(number) if isinstance(masters, dict) else None
            else:
                piece = entry(held, _states(held), number).get(kind)
            if not isinstance(piece, Stored) or not piece.shape:
                raise CheckpointError(
                    f"{self.folder}: the optimizer has no {kind} of {name}; "
                    "`weights_only=True` leaves it out"
                )
            found.append(piece)
        return found


class Ranks(dict[tuple[int, int, int], Path]):
    """The file of every (data, tensor, pipeline) rank, and the degrees."""

    data = tensor = stages = 0


def ranks_of(folder: Path) -> Ranks:
    """The rank files of a folder; CheckpointError where one is missing."""
    found = Ranks()
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := RANK.fullmatch(path.name):
            found[int(match[1]), int(match[2]), int(match[3])] = path
    found.data, found.tensor, found.stages = (
        1 + max((k[i] for k in found), default=-1) for i in range(3)
    )
    if not found:
        raise CheckpointError(f"{folder} has no file dp_rank_00_tp_rank_00_pp_rank_00.pt")
    if len(found) != found.data * found.tensor * found.stages:
        raise CheckpointError(
            f"{folder} has {len(found)} rank files, data {found.data} x tensor {found.tensor} x "
            f"pipeline {found.stages} are {found.data * found.tensor * found.stages}; copy the "
            "missing ones"
        )
    return found


def tag_of(folder: Path) -> Path:
    """The folder of a tag: this, or the newest finished one in it."""
    tags = [folder] if (folder / "model").is_dir() else [p.parent for p in folder.glob("*/done")]
    if not tags:
        raise CheckpointError(f"{folder} is no NxD checkpoint: it has no model folder and no tag")
    tag = max(tags, key=lambda path: (path / "done").stat().st_mtime if len(tags) > 1 else 0)
    if not (tag / "done").is_file():
        raise CheckpointError(f"{tag} has no file 'done': saving it never finished")
    return tag


def opened(folder: Path, path: Path) -> Mapping[Any, Any]:
    """A rank's dict, its tensors wherever they lie."""
    held = torch_zip.mapping(torch_zip.load(inside(folder, path)), path)
    tensors = path.with_name(path.name + ".tensors")
    if not tensors.is_dir():
        return held
    told = path.with_name(path.name + ".info.pt")
    info = torch_zip.mapping(torch_zip.load(inside(folder, told)), told) if told.exists() else {}

    def place(reference: torch_pickle.Reference) -> Stored:
        file = tensors / f"tensor_{reference.tid}.pt"
        about = info.get(reference.tid)
        if not file.exists() and isinstance(about, dict):
            dtype, shape = about.get("dtype"), about.get("shape")
            sizes = shape if isinstance(shape, tuple) else ("none",)
            if isinstance(dtype, torch.dtype) and all(type(n) is int and n > 0 for n in sizes):
                return Stored(file, ABSENT, dtype, 0, sizes, ())
        tensor = torch_zip.load(inside(folder, file))
        if not isinstance(tensor, Stored):
            raise CheckpointError(f"{file} holds no tensor; copy it anew")
        return tensor

    filled: Mapping[Any, Any] = torch_zip.replaced(held, torch_pickle.Reference, place)
    return filled


def weights(folder: Path, path: Path) -> State:
    """The tensors of a rank's state dict, by name."""
    held = opened(folder, path)
    held = held["model"] if isinstance(held.get("model"), dict) else held
    return {name: value for name, value in held.items() if isinstance(value, Stored)}


def _states(held: Mapping[Any, Any]) -> str:
    return "base_state" if "base_state" in held else "state"


def entry(held: Mapping[Any, Any], key: str, number: int) -> Mapping[Any, Any]:
    """``held[key][number]``, or nothing."""
    outer = held.get(key)
    inner = outer.get(number) if isinstance(outer, dict) else None
    return inner if isinstance(inner, dict) else {}
