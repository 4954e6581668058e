"""A program's own update in the place of AdamW's, and a learning rate for each parameter.

Three steps on every mesh, at every ZeRO stage, are those of a plain loop of torch.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import LLAMA2
from support.step_reference import GLOBAL_BATCH, OPTIM, SEQUENCE, batch, share
from support.world import Worlds, axes

from llamax.checkpoint.build_model import build_model
from llamax.config.schema import Config, DataConfig, OptimConfig, ParallelConfig, RunConfig
from llamax.model.llama import Llama
from llamax.optim.adamw import Step, Vectors
from llamax.parallel.collectives import Axes
from llamax.parallel.mesh import Mesh
from llamax.training.parts import Parts
from llamax.training.resolve import resolve
from llamax.training.step import TrainState

FOUR = replace(LLAMA2, num_hidden_layers=4)
STEPS, RATE = 3, 0.05


def momentum(p: Vectors, g: Vectors, m: Vectors, v: Vectors, by: Step) -> None:
    """SGD with momentum."""
    for weight, gradient, mean in zip(p, g, m, strict=True):
        new = mean * by.optim.beta1 + gradient * by.factor
        change = by.lr * (new + by.decay * weight)
        weight.copy_(torch.where(by.accepted, weight - change, weight))
        mean.copy_(torch.where(by.accepted, new, mean))


def by_depth(name: str) -> float:
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return 0.5 ** (3 - int(found[1])) if found else 0.0 if "embed" in name else 1.0


def plain() -> list[float]:
    """The losses of a loop of torch on one rank."""
    model = Llama(FOUR).init(0)
    weights = dict(model.named_parameters())
    means = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    ids, labels, positions, documents = batch()
    losses = []
    for _ in range(STEPS):
        total, count = model.loss(ids, labels, positions, documents_BS=documents)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), OPTIM.max_grad_norm)
        with torch.no_grad():
            for name, weight in weights.items():
                assert weight.grad is not None
                decay = OPTIM.weight_decay * (weight.dim() > 1)
                means[name] = means[name] * OPTIM.beta1 + weight.grad
                weight -= RATE * by_depth(name) * (means[name] + decay * weight)
                weight.grad = None
        losses.append(float((total / count).detach()))
    return losses


def on_mesh(mesh: Mesh, parallel: dict[str, Any], optim: dict[str, Any]) -> list[float]:
    at = axes(mesh, FOUR.kv_replicas(mesh.tp)) if mesh.world_size > 1 else Axes.solo()
    cut = ParallelConfig(tensor=mesh.tp, context=mesh.cp, pipeline=mesh.pp, **parallel)
    each = GLOBAL_BATCH // mesh.dp // 2
    data = DataConfig("data", sequence_length=SEQUENCE, global_batch=GLOBAL_BATCH, micro_batch=each)
    settings: OptimConfig = replace(OPTIM, **optim)
    config = Config(FOUR, cut, settings, data, run=RunConfig(steps=8))
    run = resolve(config, mesh.world_size)
    model = build_model(config, None, True, at, torch.device("cpu"))
    parts = Parts(learning_rate=lambda step: RATE, lr_scale=by_depth, update=momentum)
    state = TrainState.build(run, model, at, parts=parts)
    return [state.step(share(at, 2), number).result.loss for number in range(1, STEPS + 1)]


@pytest.mark.parametrize(
    ("mesh", "parallel", "optim"),
    [
        (Mesh(), {}, {}),
        (Mesh(), {}, {"offload": True}),
        *((Mesh(dp=2), {"zero": zero}, {}) for zero in range(4)),
        (Mesh(tp=2), {}, {}),
        (Mesh(pp=2), {}, {}),
        (Mesh(cp=2), {"zero": 3}, {}),
    ],
    ids=str,
)
def test_an_update_of_a_programs_own_steps_as_in_torch(
    worlds: Worlds, mesh: Mesh, parallel: dict[str, Any], optim: dict[str, Any]
) -> None:
    expected = plain()
    assert expected[-1] < expected[0] - 0.01
    for losses in worlds(mesh.world_size).run(on_mesh, mesh, parallel, optim):
        assert losses == pytest.approx(expected, rel=1e-6)
