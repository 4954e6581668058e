"""Numbers of a program's own in the log: means over the tokens, the same on every mesh."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import LLAMA2
from support.step_reference import GLOBAL_BATCH, OPTIM, SEQUENCE, batch, share
from support.world import WorldError, Worlds, axes
from torch import Tensor, nn

from llamax.checkpoint.build_model import build_model
from llamax.config.schema import Config, DataConfig, ParallelConfig, RunConfig
from llamax.model.llama import Llama
from llamax.parallel.collectives import Axes
from llamax.parallel.mesh import Mesh
from llamax.training.resolve import resolve
from llamax.training.step import TrainState

FOUR = replace(LLAMA2, num_hidden_layers=4)


class Measured(Llama):
    metric_names = ("partition", "hits")

    def loss(self, ids_BS: Tensor, labels_BS: Tensor, *args: Any, **options: Any) -> Any:
        logits = self.logits_of(self.hidden(ids_BS, *args, **options)).float()
        labels = labels_BS.long()
        counts = labels >= 0
        self.metric_sums = {
            "hits": (logits.argmax(-1) == labels).sum(),
            "partition": (logits.logsumexp(-1) * counts).sum(),
        }
        flat = logits.flatten(0, 1), labels.flatten()
        return nn.functional.cross_entropy(*flat, reduction="sum"), counts.sum().float()


class Routed(Measured):
    """With something to add on every stage."""

    def auxiliary_loss(self, layers: range) -> Tensor:
        return sum(self.model.layers[str(n)].input_layernorm.weight.sum() for n in layers) * 0.0


class Silent(Measured):
    metric_names = ("missing",)


KINDS = {kind.__name__: kind for kind in (Measured, Routed, Silent)}


def measured(mesh: Mesh, kind: str, options: dict[str, Any]) -> list[dict[str, float]]:
    at = axes(mesh, FOUR.kv_replicas(mesh.tp)) if mesh.world_size > 1 else Axes.solo()
    cut = ParallelConfig(tensor=mesh.tp, context=mesh.cp, pipeline=mesh.pp, **options)
    each = GLOBAL_BATCH // mesh.dp // 2
    data = DataConfig("data", sequence_length=SEQUENCE, global_batch=GLOBAL_BATCH, micro_batch=each)
    config = Config(FOUR, cut, OPTIM, data, run=RunConfig(steps=8))
    model = build_model(config, None, True, at, torch.device("cpu"), KINDS[kind])
    state = TrainState.build(resolve(config, mesh.world_size), model, at)
    steps = [state.step(share(at, 2), number) for number in (1, 2)]
    steps[1].validation_loss = state.validate([share(at, 2)])
    results = [step.result for step in steps]
    assert results[1].validation_loss == pytest.approx(results[1].loss, rel=0.1)
    return [dict(result.metrics) for result in results]


@pytest.mark.parametrize(
    ("mesh", "kind", "options"),
    [
        (Mesh(), "Measured", {}),
        (Mesh(dp=2), "Measured", {"zero": 3}),
        (Mesh(tp=2), "Measured", {"sequence": True}),
        (Mesh(cp=2), "Measured", {}),
        (Mesh(pp=2), "Routed", {}),
        (Mesh(pp=2, ends=True), "Measured", {"chunks": 2}),
    ],
    ids=str,
)
def test_metrics_are_means_over_all_tokens(
    worlds: Worlds, mesh: Mesh, kind: str, options: dict[str, Any]
) -> None:
    ids, labels, positions, documents = batch()
    with torch.no_grad():
        logits = Llama(FOUR).init(0)(ids, positions, documents_BS=documents)
    counts = labels >= 0
    expected = {
        "partition": float((logits.logsumexp(-1) * counts).sum() / counts.sum()),
        "hits": float((logits.argmax(-1) == labels).sum() / counts.sum()),
    }
    whole = measured(Mesh(), "Measured", {})
    assert whole[0] == pytest.approx(expected, rel=1e-6)
    assert whole[1]["partition"] != whole[0]["partition"]
    for found in worlds(mesh.world_size).run(measured, mesh, kind, options):
        assert [list(one) for one in found] == [["partition", "hits"]] * 2
        for one, other in zip(found, whole, strict=True):
            assert one == pytest.approx(other, rel=1e-6)


def test_a_number_that_is_not_left_is_refused(worlds: Worlds) -> None:
    words = "the loss of Silent leaves no 0-d tensor for 'missing' of metric_names; set self.metric"
    with pytest.raises(WorldError, match=words) as caught:
        worlds(1).run(measured, Mesh(), "Silent", {})
    assert "ConfigError" in str(caught.value)
