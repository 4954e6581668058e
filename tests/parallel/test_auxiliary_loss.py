"""A loss that layers add to that of the tokens, as the router of a mixture of experts does.

On every mesh it steps as on one rank, where ``loss`` itself may add it; where ``loss`` would add a
part of it alone, it is refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import LLAMA2
from support.step_reference import GLOBAL_BATCH, OPTIM, SEQUENCE, share, whole_weights
from support.world import WorldError, Worlds, axes
from torch import Tensor, nn

from llamax.checkpoint.build_model import build_model
from llamax.config.schema import Config, DataConfig, ParallelConfig, RunConfig
from llamax.model.initial_weights import generator
from llamax.model.llama import FeedForward, Llama
from llamax.parallel.collectives import Axes
from llamax.parallel.mesh import Mesh
from llamax.training.resolve import resolve
from llamax.training.step import TrainState

FOUR = replace(LLAMA2, num_hidden_layers=4)


class Experts(nn.Module):
    """Three feed-forwards, two for each token; ``penalty`` is the z-loss of their router."""

    def __init__(self, number: str, *args: Any) -> None:
        super().__init__()
        self.experts = nn.ModuleList(FeedForward(*args) for _ in range(3))
        stream = generator(0, number)
        self.router = nn.Parameter(torch.randn(3, args[0].hidden_size, generator=stream))

    def forward(self, x_BsD: Tensor) -> Tensor:
        logits = nn.functional.linear(x_BsD, self.router)
        best = logits.topk(2, -1)
        weights = torch.zeros_like(logits).scatter(-1, best.indices, best.values.softmax(-1))
        self.penalty = logits.logsumexp(-1).square().sum()
        found = [e(x_BsD) * w for e, w in zip(self.experts, weights.split(1, -1), strict=True)]
        return torch.stack(found).sum(0)


class Mixture(Llama):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for number, layer in self.model.layers.items():
            like = layer.input_layernorm.weight
            layer.mlp = Experts(number, self.config, self.tp, self.sequence_parallel, like)

    def penalty(self, layers: Any) -> Tensor:
        return 0.1 * sum(self.model.layers[str(number)].mlp.penalty for number in layers)


class Auxiliary(Mixture):
    def auxiliary_loss(self, layers: range) -> Tensor:
        return self.penalty(layers)


class Added(Mixture):
    """Its loss adds what it finds in the layers that it has."""

    def loss(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        total, count = super().loss(*args, **options)
        return total + self.penalty(self.model.layers), count


class Unsummed(Auxiliary):
    def auxiliary_loss(self, layers: range) -> Any:
        return self.penalty(layers).expand(2)


class Detached(Auxiliary):
    def auxiliary_loss(self, layers: range) -> Any:
        return self.penalty(layers).detach()


KINDS = {kind.__name__: kind for kind in (Auxiliary, Added, Unsummed, Detached)}


def stepped(at: Axes, mesh: Mesh, kind: str, options: dict[str, Any], run: dict[str, Any]) -> Any:
    """Losses, norms and weights of two steps."""
    cut = ParallelConfig(tensor=mesh.tp, context=mesh.cp, pipeline=mesh.pp, **options)
    batch = GLOBAL_BATCH // mesh.dp // 2
    data = DataConfig("data", sequence_length=SEQUENCE, global_batch=GLOBAL_BATCH)
    config = Config(
        FOUR, cut, OPTIM, replace(data, micro_batch=batch), run=RunConfig(steps=8, **run)
    )
    resolved = resolve(config, mesh.world_size)
    model = build_model(config, None, True, at, torch.device("cpu"), KINDS[kind])
    state = TrainState.build(resolved, model, at)
    done = [state.step(share(at, 2), number) for number in (1, 2)]
    parameters = model.sharded_parameters()
    return {
        "loss": [float(one.loss) for one in done],
        "norm": [float(one.grad_norm) for one in done],
        "weights": {n: x.detach().clone() for n, x in parameters.tensors.items() if not x.is_meta},
        "cuts": parameters.cuts,
    }


def on_mesh(mesh: Mesh, kind: str, options: dict[str, Any], run: dict[str, Any]) -> Any:
    return stepped(axes(mesh, FOUR.kv_replicas(mesh.tp)), mesh, kind, options, run)


@pytest.mark.parametrize(
    ("mesh", "options", "run"),
    [
        (Mesh(dp=2), {"zero": 3}, {}),
        (Mesh(tp=2), {"sequence": True}, {}),
        (Mesh(tp=2), {"sequence": False}, {}),
        (Mesh(cp=2), {}, {}),
        (Mesh(pp=2), {}, {}),
        (Mesh(pp=2), {}, {"recompute": "full"}),
        (Mesh(pp=2, ends=True), {"chunks": 2}, {}),
        (Mesh(pp=2, tp=2), {"sequence": True}, {}),
    ],
    ids=str,
)
def test_an_auxiliary_loss_steps_as_on_one_rank(
    worlds: Worlds, mesh: Mesh, options: dict[str, Any], run: dict[str, Any]
) -> None:
    whole = stepped(Axes.solo(), Mesh(), "Added", {}, {})
    results = worlds(mesh.world_size).run(on_mesh, mesh, "Auxiliary", options, run)
    for one in results:
        assert one["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        assert one["norm"] == pytest.approx(whole["norm"], rel=1e-5)
    if "zero" in options:
        return  # weights are sharded; the loss of the second step shows them
    found = whole_weights(mesh, results)
    assert found.keys() == whole["weights"].keys()
    for name, weight in whole["weights"].items():
        assert torch.allclose(found[name], weight, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize(
    ("mesh", "kind", "options", "words"),
    [
        (
            Mesh(pp=2),
            "Added",
            {},
            "the loss of Added takes more from its layers than self.hidden returns, which it "
            "cannot from the layers of other stages; return what they add to the loss from "
            "auxiliary_loss",
        ),
        (
            Mesh(tp=2),
            "Added",
            {"sequence": True},
            "the loss of Added differs between tensor ranks, as a sum over this rank's part of the "
            "sequence does; return such a part from auxiliary_loss",
        ),
        (
            Mesh(pp=2),
            "Unsummed",
            {},
            r"auxiliary_loss of Unsummed returns a tensor of \[2\]; return a sum over this rank's "
            "tokens as a 0-d tensor, or None",
        ),
        (Mesh(dp=2), "Detached", {}, "auxiliary_loss of Detached has no gradient; compute it from"),
    ],
)
def test_a_part_of_a_loss_is_refused(
    worlds: Worlds, mesh: Mesh, kind: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(WorldError, match=words) as caught:
        worlds(2).run(on_mesh, mesh, kind, options, {})
    assert "ConfigError" in str(caught.value)


def test_a_loss_that_is_whole_on_every_tensor_rank_is_not_refused(worlds: Worlds) -> None:
    whole = stepped(Axes.solo(), Mesh(), "Added", {}, {})
    for one in worlds(2).run(on_mesh, Mesh(tp=2), "Added", {"sequence": False}, {}):
        assert one["loss"] == pytest.approx(whole["loss"], rel=1e-6)
