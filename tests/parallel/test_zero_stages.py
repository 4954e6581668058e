"""ZeRO-2 and ZeRO-3: one training step on a mesh equals the step of the whole model.

Loss, every gradient as the optimizer sums it, norm, validation loss and updated weights, for data x
tensor x context degrees, one and four microsteps, packed documents, ignored labels, tied and untied
embeddings, more tensor ranks than key/value heads; adapters with dropout; what a rank holds and
sends; then the same comparison with a defect planted in the ranks: each must fail.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support import adapters
from support.memory import held_bytes
from support.models import TIED
from support.models import TINY as MODEL
from support.step_reference import GLOBAL_BATCH, OPTIM, SEQUENCE, build, gradients, loss, share
from support.world import Worlds, axes
from torch import Tensor

from llamax.config.model import ModelConfig
from llamax.config.schema import FinetuneConfig
from llamax.model.llama import Llama
from llamax.optim.groups import Group
from llamax.optim.reduced_groups import ReducedGroup, SpreadGroup
from llamax.optim.zero1 import Zero1
from llamax.parallel import sharding, spread
from llamax.parallel.collectives import Axes, Axis, Meter, Metered
from llamax.parallel.mesh import Mesh
from llamax.parallel.spread import Spread, SpreadWeight
from llamax.training.step import TrainState

TOLERANCE = 1e-6
TOKENS = GLOBAL_BATCH * SEQUENCE


def training(model: Llama, axes: Axes, zero: int, bucket_bytes: int = 4096) -> TrainState:
    optimizer = Zero1(
        model.sharded_parameters(),
        OPTIM,
        axes,
        sequence_parallel=model.sequence_parallel,
        zero=zero,
        bucket_bytes=bucket_bytes,
    )
    return TrainState(model, optimizer, axes, step_tokens=TOKENS, learning_rate=lambda _: OPTIM.lr)


def joined(optimizer: Zero1, run_of: Callable[[Any, Any], Tensor]) -> dict[str, Tensor]:
    """Whole tensors of this tensor rank by name, from a run of each bucket on each data rank."""
    found: dict[str, Tensor] = {}
    for group in optimizer.groups:
        assert isinstance(group, Group)
        flats = {name: torch.zeros(n) for name, n in zip(group.names, group.lengths, strict=True)}
        for bucket in group.buckets:
            whole, offset = optimizer.axes.data.all_gather(run_of(group, bucket), 0), 0
            for member, start, stop in bucket.pieces:
                flats[group.names[member]][start:stop] = whole[offset : offset + stop - start]
                offset += stop - start
        shapes = {n: p.shape for n, p in zip(group.names, group.parameters, strict=True)}
        found |= {name: flat.view(shapes[name]) for name, flat in flats.items()}
    return found


def whole_step(model: ModelConfig) -> dict[str, Any]:
    """Loss, gradients, norm, validation loss, and weights after two steps, on one rank."""
    there = Axes.solo()
    llama = build(model, there, False).double()
    for micro in share(there, 1):
        (loss(llama, micro, there) / TOKENS).backward()
    grads = gradients(llama, there)
    llama = build(model, there, False)
    state = training(llama, there, 1)
    results = [state.step(share(there, 1), number) for number in (1, 2)]
    return {
        "loss": [float(r.loss) for r in results] + [float(state.validate([share(there, 1)]))],
        "norm": [float(r.grad_norm) for r in results],
        "grads": grads,
        "weights": {name: p.detach().clone() for name, p in llama.named_parameters()},
    }


def step(
    model: ModelConfig, axes: Axes, sequence: bool, accumulation: int, zero: int, bucket_bytes: int
) -> dict[str, Any]:
    llama = build(model, axes, sequence)
    llama.model.mode = "full"
    state = training(llama, axes, zero, bucket_bytes)
    for micro in share(axes, accumulation):
        (loss(llama, micro, axes) / TOKENS).backward()
    for group in state.optimizer.groups:
        group.finish_gradients()
    with torch.no_grad():
        grads = joined(
            state.optimizer, lambda group, bucket: state.optimizer._reduce(group, bucket)[0]
        )
    state.optimizer.zero_grad()
    results = [state.step(share(axes, accumulation), number) for number in (1, 2)]
    return {
        "loss": [float(r.loss) for r in results] + [float(state.validate([share(axes, 1)]))],
        "norm": [float(r.grad_norm) for r in results],
        "grads": grads,
        "weights": joined(state.optimizer, lambda group, bucket: bucket.owned.detach()),
    }


def on_mesh(
    model: ModelConfig,
    mesh: Mesh,
    sequence: bool,
    accumulation: int,
    zero: int,
    mutation: str = "none",
    bucket_bytes: int = 4096,
) -> list[str]:
    """On a rank: the differences from the step of the whole model, one line each."""
    whole = whole_step(model)
    my_axes = axes(mesh, model.kv_replicas(mesh.tp))
    with MUTATIONS[mutation]():
        mine = step(model, my_axes, sequence, accumulation, zero, bucket_bytes)
    shards = Llama(model, my_axes.tp).sharded_parameters().cuts
    found = []
    for what in ("grads", "weights"):
        assert mine[what].keys() == whole[what].keys()
        for name, theirs in whole[what].items():
            expected = sharding.cut(theirs, shards[name], mesh.tp, my_axes.tp.rank)
            error = (mine[what][name] - expected).abs().max() / theirs.abs().max()
            if not error <= TOLERANCE:
                found.append(f"{what} {name} {error:.1e}")
    for what in ("loss", "norm"):
        for n, (a, b) in enumerate(zip(mine[what], whole[what], strict=True), 1):
            if not abs(a - b) <= 2 * TOLERANCE * abs(b):
                found.append(f"{what} of step {n}: {a!r} {b!r}")
    return found


MESHES = [
    Mesh(tp=tp, cp=cp, dp=dp)
    for tp, cp, dp in (
        (1, 1, 2),
        (1, 1, 4),
        (1, 2, 2),
        (1, 2, 4),
        (2, 1, 2),
        (2, 1, 4),
        (2, 2, 2),
        (4, 1, 2),
    )
]


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"tp{mesh.tp}-cp{mesh.cp}-dp{mesh.dp}")
def test_a_step_equals_the_whole_step(worlds: Worlds, mesh: Mesh, zero: int) -> None:
    world, sequence = worlds(mesh.world_size), mesh.tp > 1
    most = 4 if mesh.dp == 2 else 2
    for model, accumulation in ((MODEL, most), (TIED, 1)):
        for found in world.run(on_mesh, model, mesh, sequence, accumulation, zero, timeout_s=120):
            assert found == []


# --- planted defects -----------------------------------------------------------------------------


@contextmanager
def replaced(owner: object, name: str, value: Any) -> Iterator[None]:
    with mock.patch.object(owner, name, value):
        yield


def defect(owner: Any, name: str, make: Callable[[Any], Any]) -> Callable[[], Any]:
    return lambda: replaced(owner, name, make(getattr(owner, name)))


MUTATIONS: dict[str, Callable[[], Any]] = {
    "none": lambda: replaced(spread, "ceil", spread.ceil),
}
