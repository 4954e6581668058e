"""A program's own attention, blocks, norms and loss in the stages of a pipeline.

A step of stages equals the step of the whole model; what would differ between stages is refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import LLAMA2
from support.own_modules import CentredNorm, Gated, LogitScale
from support.step_reference import GLOBAL_BATCH, OPTIM, SEQUENCE, share, whole_weights
from support.world import WorldError, Worlds, axes
from torch import Tensor, nn

from llamax.checkpoint.build_model import build_model
from llamax.config.schema import Config, DataConfig, ParallelConfig, RunConfig
from llamax.model.causal import Causal
from llamax.model.llama import Llama
from llamax.parallel.collectives import Axes
from llamax.parallel.mesh import Mesh, Seat
from llamax.runtime.errors import ConfigError
from llamax.training.model_checks import check_stage
from llamax.training.resolve import resolve
from llamax.training.step import TrainState


class Staged(Llama):
    """Own norms, feed-forwards, attention, and a loss of scaled logits."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        D = self.config.hidden_size
        for number, layer in self.model.layers.items():
            torch.manual_seed(int(number))  # of the bottleneck
            layer.post_attention_layernorm = CentredNorm(D)
            like = layer.input_layernorm.weight
            layer.mlp = Gated(self.config, self.tp, self.sequence_parallel, like)
        if self.model.norm is not None:
            self.scaled = LogitScale()

    def hidden(
        self,
        ids_BS: Tensor,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
        attend: Any = None,
        *more: Any,
        **options: Any,
    ) -> Tensor:
        given = attend or Causal(documents_BS)

        def capped(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            o: Tensor = given(q, k.tanh(), v, layer)
            return o

        return super().hidden(ids_BS, positions_BS, documents_BS, capped, *more, **options)

    def loss(self, ids_BS: Tensor, labels_BS: Tensor, *args: Any, **options: Any) -> Any:
        logits = self.logits_of(self.hidden(ids_BS, *args, **options)) * self.scaled.scale
        flat = logits.flatten(0, 1).float(), labels_BS.flatten().long()
        total = nn.functional.cross_entropy(*flat, reduction="sum", label_smoothing=0.1)
        return total, (labels_BS >= 0).sum().float()


class Narrow(Staged):
    def loss(self, ids_BS: Tensor, labels_BS: Tensor, positions_BS: Any = None, **options: Any):  # type: ignore
        documents, keys = options.pop("documents_BS"), options.pop("keys_B")
        assert keys is None
        return super().loss(ids_BS, labels_BS, positions_BS, documents_BS=documents)


class Named(Staged):
    def loss(self, ids_BS, labels_BS, positions_BS=None, *, documents_BS=None, keys_B=None):  # type: ignore
        return super().loss(ids_BS, labels_BS, positions_BS, documents_BS=documents_BS)


class Elsewhere(Staged):
    """Its loss changes the attention, which stages without a loss do not see."""

    def loss(self, ids_BS: Tensor, labels_BS: Tensor, *args: Any, **options: Any) -> Any:
        options["attend"] = Causal(options["documents_BS"])
        return super().loss(ids_BS, labels_BS, *args, **options)


class Direct(Staged):
    """Its loss goes round ``hidden``."""

    def loss(self, ids_BS: Tensor, labels_BS: Tensor, *args: Any, **options: Any) -> Any:
        positions = torch.arange(ids_BS.shape[1])[None]
        x = self.model(ids_BS, positions, Causal(None), options["x_BsD"], options.get("layers"))
        return self.logits_of(x).logsumexp(-1).sum(), (labels_BS >= 0).sum().float()


class Everywhere(Staged):
    """A parameter beside the layers on every stage."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.temperature = nn.Parameter(torch.ones(1))


class Deaf(Staged):
    def __init__(self, model: Any, tp: Any = None, *, sequence_parallel: bool = False) -> None:
        super().__init__(model, tp, sequence_parallel=sequence_parallel)


class Frozen(Llama):
    """Its embedding and first layer are frozen: with chunks, the first chunk of stage 0 whole."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.model.embed_tokens is not None:
            self.model.embed_tokens.requires_grad_(False)
            self.model.layers["0"].requires_grad_(False)


class FrozenHalf(Frozen):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if "1" in self.model.layers:
            self.model.layers["1"].requires_grad_(False)


ALL = (Staged, Narrow, Named, Elsewhere, Direct, Everywhere, Frozen, FrozenHalf)
KINDS = {kind.__name__: kind for kind in ALL}
FOUR = replace(LLAMA2, num_hidden_layers=4)


def stepped(at: Axes, mesh: Mesh, kind: str, sequence: bool, chunks: int, micros: int) -> Any:
    """Losses, norms and weights of two steps, and a validation loss."""
    cut = ParallelConfig(
        tensor=mesh.tp,
        context=mesh.cp,
        pipeline=mesh.pp,
        chunks=chunks,
        sequence=sequence,
    )
    data = DataConfig(
        path="data",
        sequence_length=SEQUENCE,
        global_batch=GLOBAL_BATCH,
        micro_batch=GLOBAL_BATCH // mesh.dp // micros,
    )
    run = resolve(Config(FOUR, cut, OPTIM, data, run=RunConfig(steps=8)), mesh.world_size)
    model = build_model(run.config, None, True, at, torch.device("cpu"), KINDS[kind])
    state = TrainState.build(run, model, at)
    done = [state.step(share(at, micros), number) for number in (1, 2)]
    parameters = model.sharded_parameters()
    return {
        "loss": [float(one.loss) for one in done] + [float(state.validate([share(at, micros)]))],
        "norm": [float(one.grad_norm) for one in done],
        "weights": {name: x.detach().clone() for name, x in parameters.tensors.items()},
        "cuts": parameters.cuts,
    }


def on_mesh(mesh: Mesh, kind: str, sequence: bool, chunks: int, micros: int) -> Any:
    at = axes(mesh, FOUR.kv_replicas(mesh.tp))
    return stepped(at, mesh, kind, sequence, chunks, micros)


@pytest.mark.parametrize(
    ("mesh", "chunks", "micros"),
    [
        (Mesh(pp=2), 1, 4),
        (Mesh(pp=2, ends=True), 2, 4),
        (Mesh(pp=4), 1, 4),
        (Mesh(pp=2, tp=2), 1, 2),
        (Mesh(pp=2, dp=2), 1, 4),
        (Mesh(pp=2, cp=2), 1, 2),
        (Mesh(pp=2, tp=2, ends=True), 2, 2),
    ],
)
def test_own_modules_in_stages_step_as_the_whole(
    worlds: Worlds, mesh: Mesh, chunks: int, micros: int
) -> None:
    whole = stepped(Axes.solo(), Mesh(), "Staged", False, 1, 1)
    results = worlds(mesh.world_size).run(on_mesh, mesh, "Staged", mesh.tp > 1, chunks, micros)
    found = whole_weights(mesh, results)
    assert found.keys() == whole["weights"].keys()
    for one in results:
        assert one["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        assert one["norm"] == pytest.approx(whole["norm"], rel=1e-5)
    for name, weight in whole["weights"].items():
        assert torch.allclose(found[name], weight, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("Named", "the loss of Named with parallel.pipeline=2: .*'x_BsD'; define loss.*options"),
        ("Narrow", "the loss of Narrow calls self.hidden with another x_BsD than it was given"),
        ("Elsewhere", "the loss of Elsewhere calls self.hidden with another attend than it was"),
        ("Direct", "the loss of Direct does not call self.hidden, so the layers of the last"),
        (
            "FrozenHalf",
            "every parameter of stage 0 is frozen, so there is nothing to train; set req",
        ),
        ("Everywhere", "Everywhere makes temperature on stage 0 of 2, where only the last stage"),
    ],
)
def test_what_would_differ_between_stages_is_refused(worlds: Worlds, kind: str, words: str) -> None:
    with pytest.raises(WorldError, match=words) as caught:
        worlds(2).run(on_mesh, Mesh(pp=2), kind, False, 1, 2)
    assert "ConfigError" in str(caught.value)


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_frozen_chunk_passes_no_gradient_on(worlds: Worlds, chunks: int) -> None:
    whole = stepped(Axes.solo(), Mesh(), "Frozen", False, 1, 1)
    mesh = Mesh(pp=2, ends=chunks > 1)
    for one in worlds(2).run(on_mesh, mesh, "Frozen", False, chunks, 4):
        assert one["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        assert one["norm"] == pytest.approx(whole["norm"], rel=1e-5)


def test_a_stage_with_all_layers_is_refused() -> None:
    at = replace(Axes.solo(), pp=Seat(1, 2))
    with pytest.raises(ConfigError, match=r"Llama has all layers on stage 1 of 2; make it with st"):
        check_stage(Llama(FOUR), at)


def test_a_class_that_takes_no_stage_is_refused() -> None:
    config = Config(FOUR, ParallelConfig(pipeline=2), OPTIM)
    at = replace(Axes.solo(), pp=Seat(0, 2))
    with pytest.raises(ConfigError, match=r"makes Deaf with stage=..., which it does not take"):
        build_model(config, None, True, at, torch.device("cpu"), Deaf)
