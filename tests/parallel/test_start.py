"""A run with ZeRO-3 starts in the memory that it keeps, with the weights of any other run.

Weights that are cut over the data ranks are drawn, or read from a Hugging Face folder or the
checkpoint of another mesh, a run at a time: bit for bit they are those of a model that is built
whole, and no rank holds such a model, or one of its matrices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support import checkpoints
from support.adapters import base_folder
from support.memory import CPU, changes, highest
from support.models import tiny
from support.runs import on_mesh
from support.runs import share as share_of
from support.world import Worlds, axes
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from llamax.backends import choose
from llamax.checkpoint.build_model import build_model
from llamax.checkpoint.hf_folder import open_source
from llamax.checkpoint.load import load_weights
from llamax.checkpoint.reader import Checkpoint
from llamax.config.model import ModelConfig
from llamax.config.schema import Config, DataConfig, FinetuneConfig, ParallelConfig, RunConfig
from llamax.model import initial_weights
from llamax.model.llama import DTYPES, Llama
from llamax.parallel.collectives import Axes
from llamax.parallel.fsdp import fsdp_weights
from llamax.parallel.mesh import Mesh
from llamax.parallel.placeholder import Placeholder, set_values
from llamax.parallel.rendezvous import Rendezvous
from llamax.parallel.sharding import Block, Shard, ShardedParameter, ShardedParameters
from llamax.runtime.errors import ConfigError
from llamax.tools.plan.memory import memory
from llamax.tools.plan.state import early_gradients, state
from llamax.training.setup import _load
from llamax.training.step import TrainState

MODEL = tiny(  # whose key/value heads two tensor ranks share, whose vocabulary is padded
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_key_value_heads=1,
    vocab_size=1501,
)
SEED = 7


def config(
    mesh: Mesh, dtype: str, model: ModelConfig = MODEL, finetune: FinetuneConfig | None = None
) -> Config:
    return Config(
        model,
        ParallelConfig(tensor=mesh.tp, zero=3),
        data=DataConfig(sequence_length=32, micro_batch=1, global_batch=mesh.dp),
        finetune=finetune or FinetuneConfig(),
        run=RunConfig(dtype=dtype, seed=SEED),
    )


def reference(config: Config, here: Axes, source: Any) -> Llama:
    """A model that is built whole, drawn or loaded in float32, then rounded."""
    model = Llama(config.model, here.tp)
    if source is None:
        model.init(SEED)
    else:
        load_weights(source, model.sharded_parameters())
    return model.to(DTYPES[config.run.dtype])


def weights(state: TrainState) -> dict[str, Tensor]:
    """This tensor rank's weights by name, with the cut ones gathered."""
    found = {}
    modules = dict(state.model.named_modules())
    for name, parameter in state.model.named_parameters():
        layer = modules[name.rpartition(".")[0]]
        found[name] = layer.dense() if isinstance(parameter, Placeholder) else parameter
    return found


def started(config: Config, mesh: Mesh, kind: str, folder: str) -> tuple[list[str], int, int, int]:
    """In a rank: what differs from the model built whole; bytes at most, planned, and of it."""
    here = axes(mesh, config.model.kv_replicas(mesh.tp))
    backend, run = choose("cpu", Rendezvous(), 0), on_mesh(config, mesh)
    source = {"init": lambda _: None, "hub": open_source, "resumed": Checkpoint}[kind](folder)
    first = source if kind == "hub" else None
    cpu = torch.device("cpu")
    with (
        mock.patch.object(initial_weights, "AT_ONCE", 1024),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched,
    ):
        model = build_model(config, first, kind == "init", here, cpu)
        state = TrainState.build(run, model, here)
        if kind == "resumed":
            _load(source, state, model.sharded_parameters(), backend)
    whole = reference(config, here, source)
    found = weights(state)
    wrong = [n for n, p in whole.named_parameters() if not torch.equal(found[n], p)]
    for group in state.optimizer.groups:
        for bucket in group.buckets:
            if kind != "resumed" and not torch.equal(bucket.master, bucket.weights.float()):
                wrong.append(f"masters of {group.names}")
    return (
        wrong,
        highest(changes(watched))[0],
        planned(config, mesh),
        sum(p.nbytes for p in found.values()),
    )


def planned(config: Config, mesh: Mesh) -> int:
    """What the plan says that a rank holds from step to step, which a peak is never below."""
    share = share_of(config, mesh)
    lasting = sum(line.value for line in (*state(share, CPU), early_gradients(share, CPU)))
    assert lasting < memory(share, CPU).peak
    return int(lasting)


@pytest.mark.parametrize("kind", ["init", "hub", "resumed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", [Mesh(dp=8), Mesh(tp=2, dp=4, kv=2)], ids=["dp8", "tp2-dp4"])
def test_weights_are_made_in_runs(
    worlds: Worlds, tmp_path: Path, mesh: Mesh, dtype: str, kind: str
) -> None:
    folder = tmp_path / "source"
    if kind == "hub":
        base_folder(folder, MODEL)
    elif kind == "resumed":
        values = checkpoints.wholes(MODEL, DTYPES[dtype])
        ranks = checkpoints.world(MODEL, 4, 3, 1, values, DTYPES[dtype])
        folder = checkpoints.save(folder, MODEL, ranks)
    wanted = config(mesh, dtype)
    for wrong, top, kept, whole in worlds(8).run(started, wanted, mesh, kind, str(folder)):
        assert wrong == []
        # Beside what stays: rows that are drawn together; a master that a step takes in its place.
        assert top <= 1.05 * kept + 16384
        assert mesh.tp > 1 or dtype == "bfloat16" or top < 0.6 * whole


def adapted(config: Config, mesh: Mesh, folder: str) -> list[str]:
    """In a rank: which weights of a frozen base differ from those of the folder."""
    here = axes(mesh, config.model.kv_replicas(mesh.tp))
    source = open_source(folder)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        model = build_model(config, source, True, here, torch.device("cpu"))
    whole, modules = reference(config, here, source), dict(model.named_modules())
    assert len([*fsdp_weights(model)]) == 4 * config.model.num_hidden_layers
    kept = sum(each.local.nbytes for each in fsdp_weights(model))
    kept += sum(p.nbytes for p in model.parameters())
    assert highest(changes(watched))[0] <= 1.05 * kept
    return [
        name
        for name, p in whole.named_parameters()
        if not torch.equal(getattr(modules[owner := name.rpartition(".")[0]], "weight", p), p)
        or (hasattr(modules[owner], "dense") and not torch.equal(modules[owner].dense(), p))
    ]


def test_a_frozen_base_is_read_in_runs(worlds: Worlds, tmp_path: Path) -> None:
    mesh, lora = Mesh(tp=2, dp=4, kv=2), FinetuneConfig(method="lora", r=2)
    wanted = config(mesh, "float32", finetune=lora)
    folder = str(base_folder(tmp_path / "base", MODEL))
    assert worlds(8).run(adapted, wanted, mesh, folder) == [[]] * 8


class Scaled(Llama):
    """A Llama that changes what was drawn."""

    @torch.no_grad()
    def init(self, seed: int) -> Llama:
        super().init(seed)
        for layer in self.model.layers.values():
            layer.mlp.down_proj.weight.mul_(0.5)
        return self


def of_own_class(mesh: Mesh) -> list[str]:
    """In a rank: what differs in a run of a class that draws weights itself."""
    here, wanted = axes(mesh), config(mesh, "float32")
    model = build_model(wanted, None, True, here, torch.device("cpu"), Scaled)
    found = weights(TrainState.build(on_mesh(wanted, mesh), model, here))
    whole = Scaled(wanted.model, here.tp).init(SEED)
    return [n for n, p in whole.named_parameters() if not torch.equal(found[n], p)]


def test_a_class_may_change_what_was_drawn(worlds: Worlds) -> None:
    assert worlds(2).run(of_own_class, Mesh(dp=2)) == [[], []]


def drawn_again(mesh: Mesh) -> str:
    """What drawing weights raises when they are sharded."""
    here, wanted = axes(mesh), config(mesh, "float32")
    model = build_model(wanted, None, True, here, torch.device("cpu"))
    TrainState.build(on_mesh(wanted, mesh), model, here)
    try:
        model.init(0)
    except ConfigError as error:
        return str(error)
    return ""


def test_weights_in_runs_take_values_through_the_optimizer(worlds: Worlds) -> None:
    for found in worlds(2).run(drawn_again, Mesh(dp=2)):
        assert found == (
            "model.embed_tokens.weight is sharded over the data ranks; give it values before the "
            "optimizer is made, or through the optimizer's owned()"
        )


def test_a_weight_takes_values_at_once() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    set_values(weight, lambda into, start: into.copy_(torch.arange(6.0) + start))
    assert weight.detach().flatten().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("shape", "at_once"),
    [((37, 5), 64), ((40, 3), 16), ((33, 1), 16), ((2, 7), 16), ((64, 17), 100), ((3, 1000), 16)],
)
def test_rows_drawn_apart_are_those_drawn_together(shape: tuple[int, int], at_once: int) -> None:

    name, stream = "w", initial_weights.generator(SEED, "w")
    whole = torch.empty(shape).normal_(0.0, 0.5, generator=stream)
    cut = Shard(0, (Block(shape[0]),))
    parameters = ShardedParameters({name: ShardedParameter(torch.empty(shape), cut)})
    with mock.patch.object(initial_weights, "AT_ONCE", at_once):
        initial_weights.draw(parameters, name, 0.5, SEED)
    assert torch.equal(parameters[name].tensor, whole)
