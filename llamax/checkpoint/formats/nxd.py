"""Reading checkpoints of neuronx-distributed, as its ``save_checkpoint`` writes them.

::

    tag/done                                            written last
    tag/model/dp_rank_00_tp_rank_TT_pp_rank_PP.pt       a rank's state dict
    tag/optim/dp_rank_DD_tp_rank_TT_pp_rank_PP.pt       ZeRO-1: one data rank's rows of all states
        base_state[i] = {step, exp_avg, exp_avg_sq}, sharded_master_weights[i], shape_info[i]

With torch-xla's serialization ("xser") tensor i is in ``X.pt.tensors/tensor_i.pt`` instead, and
``X.pt.info.pt`` has dtypes and shapes; weights may then be left out, since the masters have them.

A rank's share of a fused projection stacks its parts: ``qkv_proj.weight`` (or ``weight_qkv``) is
[q_r; k_r; v_r], ``gate_up_proj`` is [gate_r; up_r].  States are numbered in the order of the
optimizer's groups: all parameters, or those with weight decay and then the norms.  Each state is
padded with rows of zeros and split by rows over the data ranks.

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
from llamax.checkpoint.formats.xser import (
    IGNORED_SUFFIXES,
    LEFT_OUT,
    load_file,
    stored_tensors,
)
from llamax.runtime.errors import CheckpointError

RANK = re.compile(r"dp_rank_(\d{2,})_tp_rank_(\d{2,})_pp_rank_(\d{2,})\.pt")
MOMENTS = ("exp_avg", "exp_avg_sq")


class NxdCheckpoint(RankGrid):
    """The checkpoint of a tag; in a folder of tags, that of ``step`` or the newest complete one."""

    repeats_heads = True

    def __init__(self, folder: Path, config: str, optimizer: bool, step: int | None) -> None:
        self.folder = find_tag(folder, step)
        done = (self.folder / "done").is_file()
        self.origin = f"tag {self.folder.name}{'' if done else ', which has no file done'}"
        found = find_rank_files(self.folder / "model")
        self.states = [
            [load_state_dict(self.folder, found[0, rank, stage]) for rank in range(found.tensor)]
            for stage in range(found.stages)
        ]
        self.set_model(find_model_config(self.folder, config))
        self.optimizer: list[list[list[Mapping[Any, Any]]]] = []
        if optimizer and (self.folder / "optim").is_dir():
            self._open_optimizer(find_rank_files(self.folder / "optim"))
        elif self._weights_left_out():
            raise CheckpointError(
                f"{self.folder} has its weights only as masters of the optimizer; import it "
                "with its optim folder"
            )
        self.check_all_used()

    def locations(self, name: str) -> Iterator[Location]:
        layer, attention, leaf = name.partition(".self_attn.")
        part = leaf[0] if leaf.startswith(("q_", "k_", "v_")) else ""
        if part:
            fused = f"{layer}{attention}qkv_proj"
            rows = stacked_rows(self._qkv, "qkv".index(part))
            yield Location(f"{fused}.weight_{part}", all_rows)
            yield Location(f"{fused}.weight_qkv", rows)
            yield Location(f"{fused}.weight", rows)
        owner, _, leaf = name.rpartition(".mlp.")
        if leaf in ("gate_proj.weight", "up_proj.weight"):
            part = leaf.partition("_")[0]
            rows = stacked_rows(two_halves, ("gate", "up").index(part))
            yield Location(f"{owner}.mlp.gate_up_proj.weight", rows)
        yield Location(name, all_rows)

    def dtype(self, name: str, kind: str = "weight") -> torch.dtype:
        stage, location = self.locate(name)
        if kind == "weight":
            return self.states[stage][0][location.name].dtype
        return self._pieces(stage, 0, location.name, kind)[0].dtype

    def share(self, stage: int, rank: int, name: str, kind: str) -> Tensor:
        weight = self.states[stage][rank][name]
        if kind == "weight" and weight.offset != LEFT_OUT:
            return weight.load()
        pieces = self._pieces(stage, rank, name, "master" if kind == "weight" else kind)
        rows = torch.empty(0)
        if len({piece.shape[1:] for piece in pieces}) == 1:
            rows = torch.cat([piece.load() for piece in pieces])[: weight.shape[0]]
        if tuple(rows.shape) != weight.shape:
            raise CheckpointError(
                f"{self.folder}: {kind} of {name} is {list(rows.shape)} on tensor rank {rank}, "
                f"its weight {list(weight.shape)}; copy the folder again"
            )
        return rows.to(weight.dtype) if kind == "weight" else rows

    def _qkv(self, rows: int) -> list[int]:
        queries = self.model.num_attention_heads * self.model.head_dim // self.tensor_degree
        return [queries, *two_halves(max(rows - queries, 0))]

    def _weights_left_out(self) -> bool:
        return any(s.offset == LEFT_OUT for ranks in self.states for r in ranks for s in r.values())

    # --- optimizer -------------------------------------------------------------------------------

    def _open_optimizer(self, found: RankFiles) -> None:
        if (found.tensor, found.stages) != (self.tensor_degree, len(self.states)):
            raise CheckpointError(
                f"{self.folder}: its optimizer has {found.tensor} tensor ranks and "
                f"{found.stages} stages, its model {self.tensor_degree} and {len(self.states)}"
            )
        self.optimizer = [
            [
                [load_file(self.folder, found[data, rank, stage]) for data in range(found.data)]
                for rank in range(found.tensor)
            ]
            for stage in range(found.stages)
        ]
        first = self.optimizer[0][0][0]
        masters = isinstance(first.get("sharded_master_weights"), dict)
        self.kinds = ("weight", *(["master"] if masters else []), *MOMENTS)
        try:
            self.index = [self._numbers(stage) for stage in range(found.stages)]
            step = state_entry(first, _states(first), 0).get("step", 0)
            self.step = int(step.load().item() if isinstance(step, StoredTensor) else step)
        except (TypeError, ValueError, AttributeError, RuntimeError, OverflowError):
            raise CheckpointError(
                f"{self.folder}: its optimizer state is not NxD's; use `weights_only=True`"
            ) from None

    def _numbers(self, stage: int) -> dict[str, int]:
        """The state number of every parameter, checked against the shapes in the files."""
        values, state = self.optimizer[stage][0][0], self.states[stage][0]
        names = [name for name in state if not name.endswith(IGNORED_SUFFIXES)]
        if self.model.tie_word_embeddings:
            names = [name for name in names if name != "lm_head.weight"]
        groups = [group.get("params") for group in values.get("param_groups", ())]
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
            shape = values.get("shape_info", {}).get(number, state[name].shape)
            if tuple(shape) != state[name].shape:
                raise CheckpointError(
                    f"{self.folder}: state {number} of the optimizer is {list(shape)}, "
                    f"{name} is {list(state[name].shape)}; `weights_only=True` leaves it out"
                )
        return {name: number for number, name in enumerate(ordered)}

    def _pieces(self, stage: int, rank: int, name: str, kind: str) -> list[StoredTensor]:
        """The rows of one kind of a rank's parameter, from every data rank."""
        number, found = self.index[stage][name], []
        for values in self.optimizer[stage][rank]:
            if kind == "master":
                masters = values.get("sharded_master_weights")
                piece = masters.get(number) if isinstance(masters, dict) else None
            else:
                piece = state_entry(values, _states(values), number).get(kind)
            if not isinstance(piece, StoredTensor) or not piece.shape:
                raise CheckpointError(
                    f"{self.folder}: the optimizer has no {kind} of {name}; "
                    "`weights_only=True` leaves it out"
                )
            found.append(piece)
        return found


class RankFiles(dict[tuple[int, int, int], Path]):
    """The file of every (data, tensor, pipeline) rank, and the three degrees."""

    data = tensor = stages = 0


def find_rank_files(folder: Path) -> RankFiles:
    """The rank files of a folder; CheckpointError if one is missing."""
    found = RankFiles()
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


def find_tag(folder: Path, step: int | None = None) -> Path:
    """The folder of a tag: ``folder`` itself, or the tag ``step_N`` or newest complete tag in it.

    A tag that is named needs no file ``done``: NxD asks for none, and its converter writes none.
    So does the only tag of a folder.  Raises CheckpointError if there is no such tag.
    """
    if (folder / "model").is_dir():
        number = re.search(r"\d+$", folder.name)
        if step is not None and (number is None or int(number[0]) != step):
            raise CheckpointError(f"{folder} is the tag {folder.name}, not step {step}")
        return folder
    tags = sorted(path.parent for path in folder.glob("*/model") if path.is_dir())
    if step is not None:
        if (tag := folder / f"step_{step}") not in tags:
            names = ", ".join(tag.name for tag in tags) or "none"
            raise CheckpointError(f"{folder} has no tag {tag.name}; its tags are {names}")
        return tag
    if not tags:
        raise CheckpointError(
            f"{folder} is not an NxD checkpoint: it has no model folder and no complete tag"
        )
    complete = [tag for tag in tags if (tag / "done").is_file()]
    if not complete and len(tags) > 1:
        raise CheckpointError(
            f"{folder} has no complete tag (with a file 'done'); name the folder of one: "
            + ", ".join(tag.name for tag in tags)
        )
    return max(complete or tags, key=lambda tag: (tag / "done").stat().st_mtime if complete else 0)


def load_state_dict(folder: Path, path: Path) -> StateDict:
    """The tensors of a rank's state dict by name, before any joining."""
    values = load_file(folder, path)
    values = values["model"] if isinstance(values.get("model"), dict) else values
    return dict(stored_tensors(values, path))


def _states(values: Mapping[Any, Any]) -> str:
    return "base_state" if "base_state" in values else "state"


def state_entry(values: Mapping[Any, Any], key: str, number: int) -> Mapping[Any, Any]:
    """``values[key][number]``, or nothing."""
    outer = values.get(key)
    inner = outer.get(number) if isinstance(outer, dict) else None
    return inner if isinstance(inner, dict) else {}
