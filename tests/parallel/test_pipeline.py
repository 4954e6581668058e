"""Pipeline parallelism: one training step of stages equals the whole model's.

Loss, every gradient, norm and updated weights, for pipeline x tensor x context x data degrees, with
and without sequence parallelism, packed documents, ignored labels, one and four microbatches,
uneven stages, all kinds of recomputation, more tensor ranks than key/value heads; adapters with
dropout; then the same comparisons with a defect planted in the ranks: each must fail.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support import adapters, step_reference
from support.models import tiny
from support.pipeline_defects import DROPPED, MUTATIONS, STEP, TWICE
from support.step_reference import (
    GLOBAL_BATCH,
    SEQUENCE,
    build,
    loss,
    noted,
    share,
    summed,
    training,
)
from support.world import Worlds, axes

from llamax.config.model import ModelConfig
from llamax.config.schema import FinetuneConfig
from llamax.config.types import ContextBy
from llamax.model.llama import Llama
from llamax.model.recompute import Recompute
from llamax.parallel import pipeline as schedules
from llamax.parallel.collectives import Axes
from llamax.parallel.mesh import Mesh
from llamax.training import step as training_step

TOLERANCE = 1e-6
MODEL = tiny(num_hidden_layers=4)
FIVE = tiny(num_hidden_layers=5)
SIX = tiny(num_hidden_layers=6)
TIED = tiny(num_hidden_layers=4, tie_word_embeddings=True)
LORA = FinetuneConfig(method="lora", r=4, alpha=6.0, dropout=0.25)
NF4 = FinetuneConfig(method="qlora", r=4, alpha=6.0, dropout=0.25)


def step(
    model: ModelConfig,
    axes: Axes,
    sequence: bool,
    accumulation: int,
    recompute: Recompute = "none",
    zero: int = 1,
    layers: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    """Loss, gradients, norm, validation loss, and weights after two steps.

    The gradients of one rank are computed in float64; ``rounding`` is its own in float32.
    """
    exact: dict[str, Any] = {}
    rounding = {}
    if axes.world.size == 1:
        llama = build(model, axes, sequence).double()
        (loss(llama, share(axes, 1)[0], axes) / (GLOBAL_BATCH * SEQUENCE)).backward()
        exact = {name: p.grad for name, p in llama.named_parameters()}
    llama = build(model, axes, sequence, layers)
    llama.model.mode = recompute
    state = training(llama, axes, zero)
    sums = noted(state.optimizer)
    results = [state.step(share(axes, accumulation), 1)]
    grads = summed(llama, axes, {name: grad.clone() for name, grad in sums.items()})
    for name, grad in exact.items():
        rounding[name] = float((grads[name] - grad).abs().max() / grad.abs().max())
    results.append(state.step(share(axes, accumulation), 2))
    validation = state.validate([share(axes, 1), share(axes, 2)])
    return {
        "loss": [float(r.loss) for r in results] + [float(validation)],
        "tokens": [float(r.tokens) for r in results],
        "norm": [float(r.grad_norm) for r in results],
        "grads": exact or grads,
        "rounding": rounding,
        "weights": {name: p.detach().clone() for name, p in llama.named_parameters()},
        "most": state._stage.most,
    }


def on_mesh(
    model: ModelConfig,
    mesh: Mesh,
    sequence: bool,
    accumulation: int,
    mutation: str = "none",
    recompute: Recompute = "none",
    zero: int = 1,
    layers: tuple[int, ...] | None = None,
) -> tuple[list[str], set[str]]:
    """On a rank: differences from the step of the whole model, one line each; and what it holds."""
    whole = step(model, Axes.solo(), False, 1)
    chunks = len(layers or [0]) // mesh.pp or 1
    ends = chunks > 1 or model.tie_word_embeddings
    my_axes = axes(replace(mesh, ends=ends), model.kv_replicas(mesh.tp))
    with MUTATIONS[mutation]():
        mine = step(model, my_axes, sequence, accumulation, recompute, zero, layers)
    cuts = Llama(model, my_axes.tp).sharded_parameters().cuts
    found = [name for name in mine["weights"] if name not in mine["grads"]]
    held = {what: {n: whole[what][n] for n in mine[what]} for what in ("grads", "weights")}
    found += step_reference.differences(mine, {**whole, **held}, cuts, my_axes.tp, TOLERANCE)
    if mine["tokens"] != whole["tokens"]:
        found.append(f"tokens {mine['tokens']} {whole['tokens']}")
    bound = schedules.in_flight(*my_axes.pp, accumulation, chunks)
    if mine["most"] > bound or (chunks == 1 and mine["most"] < bound):
        found.append(f"{mine['most']} in flight")
    return found, set(mine["weights"])


def differences(results: list[tuple[list[str], set[str]]], model: ModelConfig) -> list[str]:
    """What differs on any rank, and the parameters that no stage holds."""
    held = set().union(*(names for _, names in results))
    missing = {*Llama(model, device="meta").sharded_parameters()} - held
    return [line for found, _ in results for line in found] + sorted(missing)


MESHES = [
    Mesh(pp=pp, tp=tp, cp=cp, dp=dp)
    for pp, tp, cp, dp in (
        (2, 1, 1, 1),
        (3, 1, 1, 1),
        (4, 1, 1, 1),
        (2, 2, 1, 1),
        (2, 1, 2, 1),
        (2, 1, 1, 2),
        (2, 4, 1, 1),
        (4, 2, 1, 1),
        (4, 1, 2, 1),
        (4, 1, 1, 2),
        (2, 2, 2, 1),
        (2, 2, 1, 2),
        (2, 1, 2, 2),
    )
]


def named(mesh: Mesh) -> str:
    return f"pp{mesh.pp}-tp{mesh.tp}-cp{mesh.cp}-dp{mesh.dp}"


@pytest.mark.parametrize("sequence", [True, False], ids=["sequence", "plain"])
@pytest.mark.parametrize("mesh", MESHES, ids=named)
def test_stages_step_as_one(worlds: Worlds, mesh: Mesh, sequence: bool) -> None:
    if sequence and mesh.tp == 1:
        return  # nothing to cut
    world = worlds(mesh.world_size)
    for model, accumulation in ((MODEL, 4), (FIVE, 1)):
        results = world.run(on_mesh, model, mesh, sequence, accumulation)
        assert differences(results, model) == []


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_any_recomputation(worlds: Worlds, recompute: Recompute) -> None:
    mesh = Mesh(pp=2, tp=2)
    results = worlds(4).run(on_mesh, MODEL, mesh, True, 4, "none", recompute)
    assert differences(results, MODEL) == []


def test_without_zero_too(worlds: Worlds) -> None:
    mesh = Mesh(pp=2, dp=2)
    results = worlds(4).run(on_mesh, MODEL, mesh, False, 2, "none", "none", False)
    assert differences(results, MODEL) == []


@pytest.mark.parametrize("layers", [(1, 3, 1), (1, 1, 3), (3, 1, 1)], ids=str)
def test_stages_of_any_number_of_layers(worlds: Worlds, layers: tuple[int, ...]) -> None:
    mesh = Mesh(pp=3)
    results = worlds(3).run(on_mesh, FIVE, mesh, False, 4, "none", "full", True, layers)
    assert differences(results, FIVE) == []


@pytest.mark.parametrize(
    ("mesh", "model", "layers"),
    [
        (Mesh(pp=2), MODEL, (1, 1, 1, 1)),
        (Mesh(pp=2, tp=2), MODEL, (1, 1, 1, 1)),
        (Mesh(pp=2, dp=2), FIVE, (1, 1, 2, 1)),
        (Mesh(pp=2, cp=2), FIVE, (2, 1, 1, 1)),
        (Mesh(pp=3), SIX, (1,) * 6),
        (Mesh(pp=2, tp=2), SIX, (1,) * 6),
    ],
    ids=lambda case: named(case) if isinstance(case, Mesh) else "",
)
def test_chunks_step_as_one(
    worlds: Worlds, mesh: Mesh, model: ModelConfig, layers: tuple[int, ...]
) -> None:
    world = worlds(mesh.world_size)
    for recompute in ("none", "full"):
        options = mesh.tp > 1, 4 // mesh.dp, "none", recompute, 1, layers
        results = world.run(on_mesh, model, mesh, *options)
        assert differences(results, model) == []


@pytest.mark.parametrize(
    ("mesh", "zero", "layers"),
    [
        (Mesh(pp=2), 1, None),
        (Mesh(pp=4), 1, None),
        (Mesh(pp=2, tp=2), 1, (1, 1, 1, 1)),
        (Mesh(pp=2, dp=2), 1, None),
        (Mesh(pp=2, dp=2), 0, None),
        (Mesh(pp=2, dp=4, shard=2), 1, None),
    ],
    ids=lambda case: named(case) if isinstance(case, Mesh) else "",
)
def test_tied_embeddings_of_first_and_last_stage(
    worlds: Worlds, mesh: Mesh, zero: int, layers: tuple[int, ...] | None
) -> None:
    options = mesh.tp > 1, 4 // mesh.dp, "none", "none", zero, layers
    results = worlds(mesh.world_size).run(on_mesh, TIED, mesh, *options)
    assert differences(results, TIED) == []


def both_schedules(mesh: Mesh, layers: tuple[int, ...]) -> list[str]:
    """On a rank: what differs between a step by GPipe and one by 1F1B."""
    my_axes, options = axes(replace(mesh, ends=True)), (True, 4, "none", 1, layers)
    one = step(MODEL, my_axes, *options)
    with mock.patch.object(training_step, "schedule", lambda *of, split: schedules.gpipe(*of)):
        other = step(MODEL, my_axes, *options)
    assert other["most"] == 4 * len(layers) // mesh.pp > one["most"]
    pairs = [(name, one["weights"][name], other["weights"][name]) for name in one["weights"]]
    found = [name for name, a, b in pairs if not torch.equal(a, b)]
    return found + [what for what in ("loss", "norm", "tokens") if one[what] != other[what]]


@pytest.mark.parametrize("layers", [(2, 2), (1, 1, 1, 1)])
def test_gpipe_steps_as_1f1b_does(worlds: Worlds, layers: tuple[int, ...]) -> None:
    """The same sums in the same order, so the same bits."""
    for found in worlds(4).run(both_schedules, Mesh(pp=2, tp=2), layers):
        assert found == []


# --- adapters ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters.base_folder(tmp_path_factory.mktemp("base") / "hub", FOUR)


FOUR = replace(adapters.MODEL, num_hidden_layers=4)


def tuned(
    folder: Path,
    mesh: Mesh,
    cases: list[tuple[FinetuneConfig, Recompute]],
    mutation: str,
    layers: tuple[int, ...] | None = None,
    by: ContextBy = "gather",
) -> list[str]:
    """On a rank: how adapters, dropout included, differ from one rank's."""
    found: list[str] = []
    my_axes = axes(replace(mesh, ends=bool(layers)), FOUR.kv_replicas(mesh.tp))
    for finetune, recompute in cases:
        solo = Axes.solo()
        whole = adapters.steps(adapters.build(folder, solo, finetune), solo, 1, packed=True)
        with MUTATIONS[mutation]():
            model = adapters.build(folder, my_axes, finetune, mesh.tp > 1, recompute, layers=layers)
            mine = adapters.steps(model, my_axes, 4, packed=True, context_by=by)
        cuts, rank = model.sharded_parameters().cuts, my_axes.tp.rank
        found += adapters.differences(mine, whole, cuts, mesh.tp, rank, 3 * TOLERANCE)
    return found


@pytest.mark.parametrize("mesh", [Mesh(pp=2), Mesh(pp=2, tp=2), Mesh(pp=2, dp=2), Mesh(pp=4)])
def test_adapters_step_as_one_with_the_same_dropout(
    worlds: Worlds, folder: Path, mesh: Mesh
) -> None:
    cases: list[tuple[FinetuneConfig, Recompute]] = [
        (LORA, "none"),
        (LORA, "selective"),
        (LORA, "full"),
        (NF4, "full"),
    ]
    for found in worlds(mesh.world_size).run(tuned, folder, mesh, cases, "none"):
        assert found == []


@pytest.mark.parametrize(
    ("mesh", "layers", "by"),
    [
        (Mesh(pp=2), (1, 1, 1, 1), "gather"),
        (Mesh(pp=2, tp=2), (1, 1, 1, 1), "gather"),
        (Mesh(pp=2, dp=2), (1, 1, 1, 1), "gather"),
        (Mesh(pp=2, cp=2), None, "gather"),
        (Mesh(pp=2, cp=2), (1, 1, 1, 1), "ring"),
    ],
    ids=lambda case: named(case) if isinstance(case, Mesh) else str(case),
)
def test_adapters_step_as_one_in_chunks_and_parts_of_sequences(
    worlds: Worlds, folder: Path, mesh: Mesh, layers: tuple[int, ...] | None, by: ContextBy
) -> None:
    cases: list[tuple[FinetuneConfig, Recompute]] = [(LORA, "none"), (NF4, "full")]
    for found in worlds(mesh.world_size).run(tuned, folder, mesh, cases, "none", layers, by):
        assert found == []


@pytest.mark.parametrize("mutation", STEP)
def test_a_defect_of_a_step_is_caught(worlds: Worlds, mutation: str) -> None:
    mesh = Mesh(pp=2, tp=2)
    results = worlds(4).run(on_mesh, MODEL, mesh, True, 4, mutation)
    assert differences(results, MODEL)


@pytest.mark.parametrize("mutation", TWICE)
def test_a_defect_of_tied_embeddings_is_caught(worlds: Worlds, mutation: str) -> None:
    results = worlds(4).run(on_mesh, TIED, Mesh(pp=2, tp=2), True, 4, mutation)
    assert differences(results, TIED)


@pytest.mark.parametrize("mutation", DROPPED)
def test_a_defect_of_dropout_is_caught(worlds: Worlds, folder: Path, mutation: str) -> None:
    cases: list[tuple[FinetuneConfig, Recompute]] = [(LORA, "full")]
    assert any(worlds(2).run(tuned, folder, Mesh(pp=2), cases, mutation))
