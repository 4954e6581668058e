"""ZeRO over a part of the data ranks: a step on such a mesh equals the step of the whole model.

Losses, every gradient, norms and updated weights at each stage, with tensor, context and pipeline
ranks, shared key/value heads, adapters and a quantised base; groups that own the same hold the same
bits; what a rank holds, and what it sends where and how often; then planted defects, each of which
must be caught.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import adapters
from support.memory import held_bytes
from support.metering import Meter, Metered
from support.models import TIED
from support.models import TINY as MODEL
from support.planted import defect, replaced
from support.step_reference import build, differences, share, training
from support.world import Worlds, axes
from support.zero_steps import step, whole_step

from llamax.config.model import ModelConfig
from llamax.config.schema import FinetuneConfig
from llamax.model.llama import Llama
from llamax.model.lora_linear import FrozenLinear
from llamax.optim.gradients import Reduced
from llamax.optim.state import Bucket
from llamax.optim.zero import Zero
from llamax.parallel.collectives import Axes, Solo
from llamax.parallel.mesh import Mesh

TOLERANCE = 1e-6
ONE_KV_HEAD = replace(MODEL, num_key_value_heads=1)
MESHES = [
    Mesh(dp=4, shard=2),
    Mesh(tp=2, dp=4, shard=2),
    Mesh(cp=2, dp=2, shard=2),
    Mesh(cp=2, dp=4, shard=4),
    Mesh(dp=8, shard=4),
]


def named(mesh: Mesh) -> str:
    return f"tp{mesh.tp}-cp{mesh.cp}-dp{mesh.dp}-shard{mesh.shard}"


def on_mesh(
    model: ModelConfig, mesh: Mesh, accumulation: int, zero: int, mutation: str = "none"
) -> list[str]:
    """On a rank: the differences from the step of the whole model, and between groups."""
    whole = whole_step(model)
    there = axes(mesh, model.kv_replicas(mesh.tp))
    with MUTATIONS[mutation]():
        mine = step(model, there, mesh.tp > 1, accumulation, zero, 4096, "full")
    cuts = Llama(model, there.tp).sharded_parameters().cuts
    found = differences(mine, whole, cuts, there.tp, TOLERANCE)
    for name, weight in mine["weights"].items():
        first = there.replica.all_gather(weight[None], 0)[0]
        if not weight.equal(first):
            found.append(f"{name} has other bits in another group")
    return found


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("mesh", MESHES, ids=named)
def test_a_step_equals_the_whole_step(worlds: Worlds, mesh: Mesh, zero: int) -> None:
    models = {MODEL: 2, TIED: 1} if mesh.dp < 8 else {MODEL: 1}
    models |= {ONE_KV_HEAD: 2} if mesh.tp > 1 else {}
    for model, accumulation in models.items():
        micros = min(accumulation, 8 // mesh.dp)
        for found in worlds(mesh.world_size).run(on_mesh, model, mesh, micros, zero):
            assert found == []


# --- adapters ------------------------------------------------------------------------------------

LORA = FinetuneConfig(method="lora", r=4, alpha=6.0, dropout=0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters.base_folder(tmp_path_factory.mktemp("base") / "hub")


def tuned(folder: Path, mesh: Mesh, zero: int, finetune: FinetuneConfig) -> tuple[list[str], bool]:
    """On a rank: how adapters differ from one rank's; whether a base is cut over the group."""
    solo, there = Axes.solo(), axes(mesh, adapters.MODEL.kv_replicas(mesh.tp))
    whole = adapters.steps(adapters.build(folder, solo, finetune), solo, 1, packed=True)
    model = adapters.build(folder, there, finetune, mesh.tp > 1, "full", zero == 3)
    stores = [m.store for m in model.modules() if isinstance(m, FrozenLinear)]
    tensors = [getattr(store, "codes", None) or getattr(store, "tensor", None) for store in stores]
    mine = adapters.steps(model, there, 2, packed=True, zero=zero)
    cuts, rank = model.sharded_parameters().cuts, there.tp.rank
    found = adapters.differences(mine, whole, cuts, mesh.tp, rank, 3 * TOLERANCE)
    return found, {each and each.shard.size for each in tensors} == {mesh.shard}


@pytest.mark.parametrize("mesh", [Mesh(dp=4, shard=2), Mesh(tp=2, dp=4, shard=2)], ids=named)
def test_adapters_step_as_one(worlds: Worlds, folder: Path, mesh: Mesh) -> None:
    nf4 = replace(LORA, method="qlora")
    for zero, finetune in ((3, LORA), (1, nf4)):
        for found, within in worlds(mesh.world_size).run(tuned, folder, mesh, zero, finetune):
            assert found == []
            assert within


# --- bytes ---------------------------------------------------------------------------------------


def held(mesh: Mesh, zero: int) -> tuple[int, int]:
    """Bytes of weights and state: by the formula, and as held."""
    there = axes(mesh)
    optimizer = training(build(MODEL, there, False), there, zero).optimizer
    return optimizer.state_bytes(), held_bytes(optimizer)


def test_a_rank_holds_what_a_world_of_its_group_would(worlds: Worlds) -> None:
    for zero in (1, 2, 3):
        (alone, _), *_ = worlds(2).run(held, Mesh(dp=2), zero)
        for formula, found in worlds(4).run(held, Mesh(dp=4, shard=2), zero):
            assert formula == found == alone


def sent(mesh: Mesh, zero: int, microsteps: int) -> tuple[dict[Any, int], dict[Any, int]]:
    """Bytes and calls in a step on the axes of data ranks."""
    meter, there = Meter(), axes(mesh)
    assert there.group is not None
    counted = replace(
        there,
        data=Metered(there.data, meter),
        group=Metered(there.group, meter),
        replica=Metered(there.replica, meter),
    )
    state = training(build(MODEL, counted, False), counted, zero, 2**20)
    meter.clear()
    state.step(share(there, microsteps), 1)
    return dict(meter.sent_bytes), dict(meter.calls)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_groups_meet_once_a_step_over_reduced_runs(worlds: Worlds, zero: int) -> None:
    elements = sum(p.numel() for p in Llama(MODEL).parameters())
    for microsteps in (1, 2):
        for found, calls in worlds(4).run(sent, Mesh(dp=4, shard=2), zero, microsteps):
            assert {axis for axis, _ in found} == {"shard", "replica"}
            # half the float32 gradient, and of two ranks each sends an all-reduced vector once
            assert found["replica", "all_reduce"] == pytest.approx(4 * elements / 2, rel=0.01)
            scattered = 4 * elements / 2 * (1 if zero == 1 else microsteps)
            assert found["shard", "reduce_scatter"] == pytest.approx(scattered, rel=0.02)
            assert [verb for axis, verb in calls if axis == "replica"] == ["all_reduce"]


# --- planted defects -----------------------------------------------------------------------------


def groups_apart(original: Callable[..., Any]) -> Callable[..., Any]:
    def reduce(self: Zero, *place: Any) -> Any:
        kept, self.replica = self.replica, Solo("replica")
        try:
            return original(self, *place)
        finally:
            self.replica = kept

    return reduce


def summed_twice(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *place: [self.replica.all_reduce(x) for x in original(self, *place)]


def summed_in_each_microstep(original: Callable[..., Any]) -> Callable[..., Any]:
    def send(self: Reduced, bucket: Bucket) -> None:
        original(self, bucket)
        gradient = self.stored[bucket.number]
        gradient.copy_(axes(MESHES[0]).replica.all_reduce(gradient))

    return send


def every_copy_counts(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *place: original(self, *place) * self.replica.size


def over_all_data_ranks(original: Callable[..., Any]) -> Callable[..., Any]:
    """Reduced over all data ranks where only those of other groups lack their part."""

    def reduce(self: Zero, *place: Any) -> Any:
        kept, self.replica = self.replica, self.axes.data
        try:
            return original(self, *place)
        finally:
            self.replica = kept

    return reduce


DEFECTS: dict[str, tuple[int, Callable[[], Any]]] = {
    "gradients not summed over groups": (1, defect(Zero, "_reduce", groups_apart)),
    "gradients of shards not summed over groups": (3, defect(Zero, "_reduce", groups_apart)),
    "gradients summed twice": (2, defect(Zero, "_reduce", summed_twice)),
    "summed in each microstep": (2, defect(Reduced, "_send", summed_in_each_microstep)),
    "the norm counts every copy": (3, defect(Zero, "_squares", every_copy_counts)),
    "summed over all data ranks": (1, defect(Zero, "_reduce", over_all_data_ranks)),
}
MUTATIONS: dict[str, Callable[[], Any]] = {
    "none": lambda: replaced(torch, "stack", torch.stack),
    **{name: plant for name, (_, plant) in DEFECTS.items()},
}


@pytest.mark.parametrize("mutation", DEFECTS)
def test_a_planted_defect_is_caught(worlds: Worlds, mutation: str) -> None:
    zero, _ = DEFECTS[mutation]
    assert any(worlds(4).run(on_mesh, MODEL, MESHES[0], 2, zero, mutation))
