"""Defects planted in ranks that share sequences, each of which a comparison must find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from llamax import ops
from llamax.data.batch_plan import BatchPlan
from llamax.data.loader import Batches
from llamax.model.dropout import Dropout
from llamax.model.llama import Llama
from llamax.ops import IGNORE_INDEX
from llamax.optim.zero import Zero
from llamax.parallel import context_parallel, regions
from llamax.parallel.collectives import Axes
from llamax.parallel.mesh import Seat
from llamax.training import model_checks
from llamax.training.step import TrainState
from support.planted import defect, replaced


@contextmanager
def unheard() -> Iterator[None]:
    """Attention within the rank, and the check that would refuse it left out."""
    with (
        mock.patch.object(model_checks, "check_attended", return_value=None),
        defect(Llama, "loss", without(1))(),
    ):
        yield


def shifted_in_the_rank(original: Callable[..., Any]) -> Callable[..., Any]:
    def cut(self: Batches, whole: Any) -> Any:
        mine = original(self, whole)
        labels = mine.ids.roll(-1, 1)
        labels[:, -1] = IGNORE_INDEX
        return mine._replace(labels=labels.where(mine.labels != IGNORE_INDEX, IGNORE_INDEX))

    return cut


def first_part_only(original: Callable[..., Any]) -> Callable[..., Any]:
    """Every context rank takes the part of the first."""

    def of(*arguments: Any) -> BatchPlan:
        plan = original(*arguments)
        return replace(plan, cp=Seat(0, plan.cp.size))

    return of


def own_documents(original: Callable[..., Any]) -> Callable[..., Any]:
    """Documents in the order of the sequence instead of the ranks'."""
    return lambda x, size: x


def mean_of_each_micro(original: Callable[..., Any]) -> Callable[..., Any]:
    def one(self: TrainState, *arguments: Any) -> tuple[Tensor, Tensor]:
        total, count = original(self, *arguments)
        return total / count.clamp(min=1) * (self.step_tokens / 8), count

    return one


def without(place: int) -> Callable[..., Any]:
    """A context rank that leaves out an argument of ``Llama.loss``."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def loss_of(self: Llama, ids: Tensor, labels: Tensor, positions: Any, **more: Any) -> Any:
            if place == 0:
                positions = None
            if place == 1:
                more["attend"] = None
            if place == 2:
                more["places_S"] = None
            return original(self, ids, labels, positions, **more)

        return loss_of

    return make


def keys_of_data_rank(self: TrainState, batch: Any, number: int, place: int) -> Any:
    rows, data_axis = batch.ids.shape[0], self.axes.data
    assert self.model.dropout is not None
    return self.model.dropout.keys(number, (place * data_axis.size + data_axis.rank) * rows, rows)


def top_left(original: Callable[..., Any]) -> Callable[..., Any]:
    """Queries at the begin of the keys instead of their end."""

    def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
        end = q.shape[1]
        seen = None if documents is None else documents[:, :end]
        return original(q, k[:, :end], v[:, :end], seen)

    return attention


def over_context_alone(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Zero, parameters: Any, optim: Any, axes: Axes, **more: Any) -> None:
        original(self, parameters, optim, replace(axes, data=axes.cp), **more)

    return __init__


STEP = {
    "joined instead of collected": defect(regions, "collect", lambda _: regions.join),
    "gradients of keys not summed": defect(
        regions._Collect,
        "backward",
        lambda _: staticmethod(lambda ctx, dy: (regions.share(dy, ctx.axis, ctx.dim), None, None)),
    ),
    "positions from zero": defect(Llama, "loss", without(0)),
    "attention within the rank": unheard,
    "contiguous cut": defect(
        context_parallel, "chunks_of", lambda _: lambda rank, size: (2 * rank, 2 * rank + 1)
    ),
    "keys in rank order": defect(
        context_parallel,
        "_in_sequence",
        lambda _: lambda x, size, count: torch.cat(x.chunk(2 * size, 1)[:count], 1),
    ),
    "documents in the order of the sequence": defect(
        context_parallel, "in_rank_order", own_documents
    ),
    "documents ignored": defect(
        context_parallel, "across", lambda original: lambda axis, *_: original(axis)
    ),
    "queries at the begin of their keys": defect(ops, "attention", top_left),
    "gradients summed over context ranks alone": defect(Zero, "__init__", over_context_alone),
}
LOADED = {
    "labels shifted in the rank": defect(Batches, "_cut", shifted_in_the_rank),
    "every rank takes the first part": defect(BatchPlan, "of", first_part_only),
    "mean of each microbatch": defect(TrainState, "_loss", mean_of_each_micro),
    "samples dealt by data rank": lambda: replaced(
        Axes, "dp", property(lambda self: Seat(self.data.rank, self.data.size))
    ),
}
DROPPED = {
    "dropout's places from zero": defect(Llama, "loss", without(2)),
    "dropout's keys by data rank": lambda: replaced(TrainState, "_keys", keys_of_data_rank),
    "dropout without places": defect(
        Dropout,
        "begin",
        lambda original: lambda self, keys, length, places: original(self, keys, length),
    ),
}
MUTATIONS: dict[str, Callable[[], Any]] = {
    "none": lambda: replaced(context_parallel, "across", context_parallel.across),
    **STEP,
    **LOADED,
    **DROPPED,
}
