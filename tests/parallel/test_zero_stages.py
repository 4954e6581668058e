"""ZeRO-2 and ZeRO-3: one training step on a mesh equals the step of the whole model.

Loss, every gradient as the optimizer sums it, norm, validation loss and updated weights, for data x
tensor x context degrees, one and four microsteps, packed documents, ignored labels, tied and untied
embeddings, more tensor ranks than key/value heads; adapters with dropout; what a rank holds and
sends; then the same comparison with a defect planted in the ranks: each must fail.
"""

from __future__ import annotations

import operator
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from support import adapters
from support.memory import held_bytes
from support.metering import Meter, Metered
from support.models import TIED
from support.models import TINY as MODEL
from support.step_reference import (
    OPTIM,
    build,
    share,
    training,
)
from support.world import Worlds, axes
from support.zero_defects import FSDP, REDUCED, SHARED, TOLERANCE, on_mesh
from torch import Tensor
from torch.nn import Parameter

from llamax import ops
from llamax.config.schema import FinetuneConfig
from llamax.model.llama import FeedForward, Llama
from llamax.model.lora_linear import FrozenLinear
from llamax.model.recompute import Recompute
from llamax.optim.zero import Zero
from llamax.parallel.collectives import Axes
from llamax.parallel.mesh import Mesh
from llamax.parallel.placeholder import Placeholder
from llamax.parallel.sharding import Block, Shard, ShardedParameter, ShardedParameters
from llamax.runtime.errors import ConfigError

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
        for found in world.run(on_mesh, model, mesh, sequence, accumulation, zero):
            assert found == []


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("mesh", [Mesh(dp=2), Mesh(tp=2, dp=2)], ids=str)
def test_weights_are_gathered_again_where_layers_are_not_recomputed(
    worlds: Worlds, mesh: Mesh, recompute: Recompute
) -> None:
    rest = ("none", 4096, recompute)
    for found in worlds(mesh.world_size).run(on_mesh, TIED, mesh, mesh.tp > 1, 2, 3, *rest):
        assert found == []


# --- adapters ------------------------------------------------------------------------------------

LORA = FinetuneConfig(method="lora", r=4, alpha=6.0, dropout=0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters.base_folder(tmp_path_factory.mktemp("base") / "hub")


def tuned(
    folder: Path, mesh: Mesh, zero: int, recompute: str, finetune: FinetuneConfig = LORA
) -> list[str]:
    """On a rank: how adapters with dropout differ from one rank's."""
    solo, my_axes = Axes.solo(), axes(mesh, adapters.MODEL.kv_replicas(mesh.tp))
    whole = adapters.steps(adapters.build(folder, solo, finetune), solo, 1, packed=True)
    sharded_base = zero == 3
    model = adapters.build(folder, my_axes, finetune, mesh.tp > 1, recompute, sharded_base)
    layers = [m for m in model.modules() if isinstance(m, FrozenLinear)]
    assert layers
    stored = sharded_base or finetune.method == "qlora"
    assert all((layer.store is not None) == stored for layer in layers)
    mine = adapters.steps(model, my_axes, 2, packed=True, zero=zero)
    cuts, rank = model.sharded_parameters().cuts, my_axes.tp.rank
    return adapters.differences(mine, whole, cuts, mesh.tp, rank, 3 * TOLERANCE)


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("mesh", [Mesh(dp=2), Mesh(tp=2, dp=2), Mesh(cp=2, dp=2)], ids=str)
def test_adapters_step_as_one(worlds: Worlds, folder: Path, mesh: Mesh, zero: int) -> None:
    for recompute in ("none", "full"):
        for found in worlds(mesh.world_size).run(tuned, folder, mesh, zero, recompute):
            assert found == []


@pytest.mark.parametrize("zero", [2, 3])
def test_adapters_on_a_quantised_base_step_as_one(worlds: Worlds, folder: Path, zero: int) -> None:
    nf4 = replace(LORA, method="qlora")
    for found in worlds(4).run(tuned, folder, Mesh(tp=2, dp=2), zero, "full", nf4):
        assert found == []


# --- bytes ---------------------------------------------------------------------------------------


def held(zero: int) -> tuple[int, int, int]:
    """Bytes of weights and state: by the formula, as held, and of all weights in float32."""
    there = axes(Mesh(dp=2))
    llama = build(MODEL, there, False)
    whole = sum(p.nbytes for p in llama.parameters())
    optimizer = training(llama, there, zero).optimizer
    return optimizer.state_bytes(), held_bytes(optimizer), whole


def test_each_stage_holds_less(worlds: Worlds) -> None:
    """Of 16 bytes a weight, two ranks halve moments (8), then gradients (4), then weights (4)."""
    expected = {0: 16, 1: 12, 2: 10, 3: 8}
    for zero, each in expected.items():
        for formula, found, whole in worlds(2).run(held, zero):
            assert formula == found
            assert found == pytest.approx(each * whole / 4, rel=0.02)


def sent(zero: int, microsteps: int, recompute: Recompute = "full") -> dict[tuple[str, str], int]:
    """Bytes on the data axis in a step."""
    meter, there = Meter(), axes(Mesh(dp=2))
    counted = replace(there, data=Metered(there.data, meter))
    llama = build(MODEL, counted, False)
    llama.model.mode = recompute
    state = training(llama, counted, zero, 2**20)
    meter.clear()
    state.step(share(there, microsteps), 1)
    return dict(meter.sent_bytes)


def test_each_stage_sends_what_the_plan_says(worlds: Worlds) -> None:
    """ZeRO-2: gradients after each microstep; ZeRO-3: weights too, before forward and backward."""
    llama = Llama(MODEL)
    matrices = {n: p for n, p in llama.named_parameters() if p.dim() > 1}
    whole = 4 * sum(p.numel() for p in matrices.values()) // 2
    norms = 4 * sum(p.numel() for p in llama.parameters() if p.dim() == 1) // 2
    once = 4 * sum(p.numel() for n, p in matrices.items() if ".layers." not in n) // 2
    stages = ((1, whole, "full"), (2, whole, "full"))
    fsdp_stages = ((3, 4 * (2 * whole - once), mode) for mode in get_args(Recompute))
    for zero, gathers, mode in (*stages, *fsdp_stages):
        scattered = whole if zero == 1 else 4 * whole
        for found in worlds(2).run(sent, zero, 4, mode):
            assert found["data", "all_gather"] == pytest.approx(gathers + norms, rel=0.01)
            assert found["data", "reduce_scatter"] == pytest.approx(scattered + norms, rel=0.01)


# --- weights without values ----------------------------------------------------------------------


class Reading(FeedForward):
    """A feed-forward that takes the weight of a layer of llamax itself."""

    def forward(self, x_BsD: Tensor) -> Tensor:
        gate_up_BSf = torch.nn.functional.linear(x_BsD, self.gate_up_proj.weight)
        return self.down_proj(ops.swiglu(gate_up_BSf))


def reads_weights(zero: int) -> str:
    """What a step of such a model raises."""
    there = axes(Mesh(dp=2))
    llama = build(MODEL, there, False)
    for layer in llama.model.layers.values():
        layer.mlp.__class__ = Reading
    state = training(llama, there, zero)
    try:
        state.step(share(there, 1), 1)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_weight_without_values_is_not_computed_with(worlds: Worlds) -> None:
    assert worlds(2).run(reads_weights, 2) == ["", ""]
    for found in worlds(2).run(reads_weights, 3):
        assert found == (
            "linear reads model.layers.0.mlp.gate_up_proj.weight, of which each data rank keeps a "
            "shard with parallel.zero=3; use layer.dense(), which gathers it, in place of "
            "layer.weight, or parallel.zero=2"
        )


@pytest.mark.parametrize(
    "use",
    [
        lambda w: torch.ones(2, 3) @ w.T,
        lambda w: torch.nn.functional.embedding(torch.tensor([1]), w) + torch.ones(3),
        lambda w: torch.cat([torch.ones(1, 3), w]),
        lambda w: w.square().sum() + torch.ones(()),
        lambda w: w.norm().item(),
    ],
)
def test_nothing_is_computed_from_a_placeholder(use: Callable[[Tensor], Any]) -> None:
    weight = Placeholder(torch.empty(4, 3, device="meta"))
    assert (weight.shape, weight.dtype, weight.numel()) == ((4, 3), torch.float32, 12)
    with pytest.raises(ConfigError, match="reads a weight, of which each data rank keeps a shard"):
        use(weight)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.copy_(torch.ones(4, 3)),
        lambda w: w.mul_(2),
        lambda w: w.data.clamp_(-1, 1),
        lambda w: w.detach().zero_(),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: operator.isub(w, 1.0),
        lambda w: operator.itruediv(w, 2.0),
        torch.nn.init.ones_,
    ],
)
def test_a_placeholder_is_not_changed(change: Callable[[Tensor], Any]) -> None:
    weight = Placeholder(torch.empty(4, 3, device="meta"))
    with torch.no_grad(), pytest.raises(ConfigError, match="_ would change a weight, of which eac"):
        change(weight)
    assert not weight.requires_grad_(False).requires_grad


def test_a_placeholder_is_not_pickled() -> None:
    weight = Placeholder(torch.empty(4, 3, device="meta"))
    with pytest.raises(ConfigError, match="a weight cannot be pickled, because each data rank ke"):
        pickle.dumps({"weight": weight})


# --- gradients that do not come ------------------------------------------------------------------


def unused(zero: int) -> list[tuple[str, float]]:
    """How gradients of two microsteps, one of which uses a part of the model, are summed."""
    found = []
    for there in (Axes.solo(), axes(Mesh(dp=2))):
        torch.manual_seed(0)
        weights = {name: Parameter(torch.randn(5, 3)) for name in "abc"}
        cut = Shard(0, (Block(5),))
        sharded = ShardedParameters({n: ShardedParameter(w, cut) for n, w in weights.items()})
        optimizer = Zero(sharded, OPTIM, there, sequence_parallel=False, zero=zero, bucket_bytes=48)
        scales = (1.0, 2.0) if there.data.size == 1 else (1.0 + there.data.rank,)
        for used in ("ac", "abc"):
            for scale in scales:
                sum(scale * (weights[name] ** 2).sum() for name in used).backward()
        one, lr = torch.tensor(1.0), torch.tensor(OPTIM.lr)
        norm = optimizer.step(lr, one, one)
        found.append((float(norm), {n: w.detach().clone() for n, w in weights.items()}))
    (norm, whole), (mine, updated) = found
    wrong = [] if mine == pytest.approx(norm, rel=1e-6) else [("norm", mine / norm)]
    return wrong + [
        (name, float((updated[name] - w).abs().max()))
        for name, w in whole.items()
        if not torch.allclose(updated[name], w, atol=1e-6)
    ]


def test_gradients_that_a_microstep_lacks_are_zero(worlds: Worlds) -> None:
    for found in worlds(2).run(unused, 2):
        assert found == []


# --- planted defects -----------------------------------------------------------------------------


@pytest.mark.parametrize("mutation", FSDP)
def test_a_defect_of_fsdp_weights_is_caught(worlds: Worlds, mutation: str) -> None:
    assert any(worlds(2).run(on_mesh, MODEL, Mesh(dp=2), False, 2, 3, mutation))


def test_a_defect_of_weights_gathered_again_is_caught(worlds: Worlds) -> None:
    rest = (MODEL, Mesh(dp=2), False, 2, 3, "gathered again as another view", 4096, "none")
    assert any(worlds(2).run(on_mesh, *rest))


@pytest.mark.parametrize("mutation", REDUCED)
def test_a_defect_of_reduced_gradients_is_caught(worlds: Worlds, mutation: str) -> None:
    assert any(worlds(2).run(on_mesh, MODEL, Mesh(dp=2), False, 2, 2, mutation))


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("mutation", SHARED)
def test_a_defect_of_shared_heads_is_caught(worlds: Worlds, mutation: str, zero: int) -> None:
    found = worlds(8).run(on_mesh, MODEL, Mesh(tp=4, dp=2), True, 1, zero, mutation)
    assert any(found)
