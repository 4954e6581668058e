"""A step at a ZeRO stage beside that of the whole model, with a defect planted in the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llamax.config.model import ModelConfig
from llamax.model.llama import Llama
from llamax.model.recompute import Recompute
from llamax.optim import groups
from llamax.optim.gradients import Reduced
from llamax.optim.state import Bucket
from llamax.optim.zero import Zero
from llamax.parallel import fsdp
from llamax.parallel.fsdp import FsdpTensor, FsdpWeight
from llamax.parallel.mesh import Mesh
from llamax.parallel.reductions import Reductions
from support.planted import defect, replaced
from support.step_reference import differences
from support.world import axes
from support.zero_steps import step, whole_step

TOLERANCE = 1e-6


def stale() -> Callable[[Any], Any]:
    """A rank goes on with the weights that it gathered in the first step."""
    kept: dict[int, Tensor] = {}

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self: kept.setdefault(id(self), original(self))

    return make


def twice(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, dw: (original(self, dw), original(self, dw))[1]


def of_own_rank(self: FsdpTensor, whole: Tensor) -> Callable[[], Tensor]:
    each, rank = len(self.local), self.shard.rank
    whole = torch.nn.functional.pad(whole, (0, each * self.shard.size - len(whole)))
    return lambda: whole[rank * each : (rank + 1) * each]


def averaged(original: Callable[..., Any]) -> Callable[..., Any]:
    def start_reduce(self: FsdpTensor, whole: Tensor) -> Callable[[], Tensor]:
        wait = original(self, whole)
        return lambda: wait() / self.shard.size

    return start_reduce


def without_the_last(self: Reductions, total: Tensor, start: Any) -> None:
    self.finish()
    self._started = total, start()


def without_the_one_before(original: Callable[..., Any]) -> Callable[..., Any]:
    def add(self: Reductions, total: Tensor, start: Any) -> None:
        if self._started is not None:
            self._started[1]()
            self._started = None
        original(self, total, start)

    return add


def first_shard(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: FsdpTensor, length: int, values: Any, *more: Any) -> None:
        original(self, length, values, *more)
        values(self.local, 0)

    return __init__


def kept_gradients(original: Callable[..., Any]) -> Callable[..., Any]:
    """What was sent stays, and is sent again with the next microstep's."""

    def send(self: Reduced, bucket: Bucket) -> None:
        before = dict(self._unsent[bucket.number])
        original(self, bucket)
        self._unsent[bucket.number].update(before)

    return send


def summed_again(original: Callable[..., Any]) -> Callable[..., Any]:
    def reduce(self: Zero, group: Any, bucket: Any) -> list[Tensor]:
        return [self.axes.data.all_reduce(run) for run in original(self, group, bucket)]

    return reduce


FSDP = {
    "gathered weights are stale": lambda: replaced(
        FsdpTensor, "gather", stale()(FsdpTensor.gather)
    ),
    "gradient added twice": defect(FsdpWeight, "add_gradient", twice),
    "gradient averaged over ranks": defect(FsdpTensor, "start_reduce", averaged),
    "gradient of this rank alone": lambda: replaced(FsdpTensor, "start_reduce", of_own_rank),
    "gradient of another shard": defect(
        FsdpTensor, "start_reduce", lambda original: lambda self, dw: original(self, dw.roll(1))
    ),
    "the last sum of a backward is lost": lambda: replaced(Reductions, "add", without_the_last),
    "a sum is lost where the next begins": defect(Reductions, "add", without_the_one_before),
    "every rank keeps the first shard": defect(FsdpTensor, "__init__", first_shard),
    "weights not taken from the masters' rank": defect(
        FsdpTensor, "gather", lambda original: lambda self: original(self).flip(0)
    ),
}
REDUCED = {
    "gradients summed again by the optimizer": defect(Zero, "_reduce", summed_again),
    "sent gradients are sent again": defect(Reduced, "_send", kept_gradients),
    "gradients not sent in backward": lambda: replaced(
        Reduced, "_arrived", lambda self, member, parameter: None
    ),
    "shards of another rank": defect(
        Reduced,
        "_send",
        lambda original: (
            lambda self, bucket: (
                original(self, bucket),
                self.stored[bucket.number].copy_(self.shard.shift(self.stored[bucket.number])),
            )
        ),
    ),
}
SHARED = {
    "heads of several ranks summed in the wrong places": defect(
        groups, "shared_spans", lambda original: lambda counted, a, b: original(counted, 0, b - a)
    ),
    "heads of several ranks not summed": defect(
        groups, "shared_spans", lambda original: lambda counted, a, b: ()
    ),
}
MUTATIONS: dict[str, Callable[[], Any]] = {
    "gathered again as another view": defect(
        fsdp,
        "_unpack",
        lambda original: (
            lambda saved: (
                original(saved)
                if isinstance(saved, Tensor)
                else saved.store.dense().view(saved.shape)
            )
        ),
    ),
    "none": lambda: replaced(fsdp, "ceil", fsdp.ceil),
    **FSDP,
    **REDUCED,
    **SHARED,
}


def on_mesh(
    model: ModelConfig,
    mesh: Mesh,
    sequence: bool,
    accumulation: int,
    zero: int,
    mutation: str = "none",
    bucket_bytes: int = 4096,
    recompute: Recompute = "full",
) -> list[str]:
    """On a rank: the differences from the step of the whole model, one line each."""
    whole = whole_step(model)
    my_axes = axes(mesh, model.kv_replicas(mesh.tp))
    with MUTATIONS[mutation]():
        mine = step(model, my_axes, sequence, accumulation, zero, bucket_bytes, recompute)
    shards = Llama(model, my_axes.tp).sharded_parameters().cuts
    return differences(mine, whole, shards, my_axes.tp, TOLERANCE)
