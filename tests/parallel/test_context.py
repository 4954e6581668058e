"""Context parallelism: one training step of ranks that share sequences equals the whole model's.

Loss, every gradient, norm and updated weights, for tensor x context x data degrees with and without
sequence parallelism, packed documents, ignored labels, one and four microsteps, tied and untied
embeddings, more tensor ranks than key/value heads; adapters with dropout; batches of the loader;
then the same comparisons with a defect planted in the ranks: each must fail.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from support import adapters
from support.context_defects import DROPPED, LOADED, MUTATIONS, STEP
from support.models import TIED
from support.models import TINY as MODEL
from support.step_reference import (
    GLOBAL_BATCH,
    SEQUENCE,
    build,
    context_sent,
    differences,
    gradients,
    loss,
    share,
    training,
)
from support.world import Worlds, axes
from torch import Tensor

from llamax import ops
from llamax.config.model import ModelConfig
from llamax.config.schema import DataConfig, FinetuneConfig
from llamax.data.header import Header
from llamax.data.samples import Samples
from llamax.data.token_file import TokenFile, TokenWriter
from llamax.model.llama import Llama
from llamax.model.recompute import Recompute
from llamax.parallel import context_parallel
from llamax.parallel.collectives import Axes
from llamax.parallel.mesh import Mesh, Seat

TOLERANCE = 1e-6
LORA = FinetuneConfig(method="lora", r=4, alpha=6.0, dropout=0.25)
NF4 = FinetuneConfig(method="qlora", r=4, alpha=6.0, dropout=0.25)


def step(
    model: ModelConfig,
    axes: Axes,
    sequence: bool,
    accumulation: int,
    recompute: Recompute = "none",
    zero: int = 1,
) -> dict[str, Any]:
    """Loss, gradients, norm, validation loss, and weights after two steps.

    The gradients of one rank are computed in float64, so that its rounding is not counted.
    """
    llama = build(model, axes, sequence)
    llama.model.mode = recompute
    if axes.world.size == 1:
        llama.double()
    for micro in share(axes, accumulation):
        (loss(llama, micro, axes) / (GLOBAL_BATCH * SEQUENCE)).backward()
    grads = gradients(llama, axes)
    llama = build(model, axes, sequence)
    llama.model.mode = recompute
    state = training(llama, axes, zero)
    results = [state.step(share(axes, accumulation), number) for number in (1, 2)]
    return {
        "loss": [float(r.loss) for r in results] + [float(state.validate([share(axes, 1)]))],
        "norm": [float(r.grad_norm) for r in results],
        "grads": grads,
        "weights": {name: p.detach().clone() for name, p in llama.named_parameters()},
    }


def on_mesh(
    model: ModelConfig,
    mesh: Mesh,
    sequence: bool,
    accumulation: int,
    mutation: str = "none",
    recompute: Recompute = "none",
    zero: int = 1,
) -> list[str]:
    """On a rank: the differences from the step of the whole model, one line each."""
    whole = step(model, Axes.solo(), False, 1)
    my_axes = axes(mesh, model.kv_replicas(mesh.tp))
    with MUTATIONS[mutation]():
        mine = step(model, my_axes, sequence, accumulation, recompute, zero)
    shards = Llama(model, my_axes.tp).sharded_parameters().cuts
    return differences(mine, whole, shards, my_axes.tp, TOLERANCE)


MESHES = [
    Mesh(tp=tp, cp=cp, dp=dp)
    for tp, cp, dp in ((1, 2, 1), (1, 2, 2), (1, 4, 1), (2, 2, 1), (2, 2, 2), (4, 2, 1))
]


@pytest.mark.parametrize("sequence", [True, False], ids=["sequence", "plain"])
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"tp{mesh.tp}-cp{mesh.cp}-dp{mesh.dp}")
def test_ranks_that_share_sequences_step_as_one(worlds: Worlds, mesh: Mesh, sequence: bool) -> None:
    if sequence and mesh.tp == 1:
        return  # nothing to cut
    world = worlds(mesh.world_size)
    for model, accumulation in ((MODEL, 4), (TIED, 1)):
        for found in world.run(on_mesh, model, mesh, sequence, accumulation):
            assert found == []


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_attention_gathers_again(worlds: Worlds, recompute: Recompute) -> None:
    for found in worlds(4).run(on_mesh, MODEL, Mesh(tp=2, cp=2), True, 1, "none", recompute):
        assert found == []


def test_without_zero_too(worlds: Worlds) -> None:
    mesh = Mesh(cp=2, dp=2)
    for found in worlds(4).run(on_mesh, MODEL, mesh, False, 2, "none", "none", False):
        assert found == []


# --- adapters ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters.base_folder(tmp_path_factory.mktemp("base") / "hub")


def tuned(
    folder: Path, mesh: Mesh, cases: list[tuple[FinetuneConfig, bool]], mutation: str
) -> list[str]:
    """On a rank: how adapters, dropout included, differ from one rank's; packed or not."""
    found, my_axes = [], axes(mesh, adapters.MODEL.kv_replicas(mesh.tp))
    for finetune, packed in cases:
        solo = Axes.solo()
        whole = adapters.steps(adapters.build(folder, solo, finetune), solo, 1, packed=packed)
        with MUTATIONS[mutation]():
            model = adapters.build(folder, my_axes, finetune, mesh.tp > 1, "full")
            mine = adapters.steps(model, my_axes, 2, packed=packed)
        cuts, rank = model.sharded_parameters().cuts, my_axes.tp.rank
        found += adapters.differences(mine, whole, cuts, mesh.tp, rank, 3 * TOLERANCE)
    return found


@pytest.mark.parametrize(
    "mesh", [Mesh(cp=2, dp=2), Mesh(tp=2, cp=2), Mesh(tp=2, cp=2, dp=2)], ids=str
)
def test_adapters_step_as_one_with_the_same_dropout(
    worlds: Worlds, folder: Path, mesh: Mesh
) -> None:
    cases = [(LORA, True), (LORA, False), (NF4, True)]
    world = worlds(mesh.world_size)
    for found in world.run(tuned, folder, mesh, cases, "none"):
        assert found == []


# --- batches -------------------------------------------------------------------------------------

LENGTH, BATCH = 16, 8


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 3 to 29 tokens; answers, which count, begin somewhere in each."""
    path = tmp_path_factory.mktemp("tokens") / "train.tokens"
    random = np.random.default_rng(0)
    with TokenWriter(path, Header("", 61, eos_id=2)) as writer:
        for _ in range(60):
            length = int(random.integers(3, 30))
            ids = random.integers(3, 61, length).astype(np.uint16)
            answer = int(random.integers(1, length))
            writer.add(ids, np.array([length]), length, np.arange(length) >= answer)
    return path


def data(packing: str, separate: bool) -> DataConfig:
    return DataConfig(
        sequence_length=LENGTH,
        global_batch=BATCH,
        micro_batch=1,
        packing=packing,  # type: ignore[arg-type]
        separate_documents=separate,
    )


@pytest.mark.parametrize("separate", [True, False], ids=["separate", "joined"])
@pytest.mark.parametrize("packing", ["best-fit", "concat"])
@pytest.mark.parametrize("cp", [2, 4])
def test_parts_of_batches_are_the_whole_batches(
    tokens: Path, packing: str, separate: bool, cp: int
) -> None:
    """Put together in rank order, everything that a step reads is what one rank reads."""
    samples = Samples(TokenFile(tokens), data(packing, separate), seed=3)
    whole = samples.loader(Seat(0, 2), 8, shuffle=True)
    parts = [samples.loader(Seat(0, 2), 8, shuffle=True, cp=Seat(r, cp)) for r in range(cp)]
    for _ in range(3):
        steps = [each.step() for each in parts]
        for one, *shares in zip(whole.step(), *steps, strict=True):
            for name in ("ids", "labels", "positions"):
                found = torch.cat([getattr(each, name) for each in shares], 1)
                expected = context_parallel.in_rank_order(getattr(one, name), cp)
                assert torch.equal(found, expected), name
            for each in shares:
                assert (one.documents is None) == (each.documents is None) == (not separate)
                if one.documents is not None:
                    expected = context_parallel.in_rank_order(one.documents, cp)
                    assert torch.equal(each.documents, expected)


@pytest.mark.parametrize("cp", [1, 2, 3, 5])
def test_every_place_is_on_one_rank_and_pairs_are_balanced(cp: int) -> None:
    length = 6 * cp
    where = torch.arange(length)[None]
    shares = [context_parallel.cut(where, rank, cp)[0] for rank in range(cp)]
    assert sorted(torch.cat(shares).tolist()) == [*range(length)]
    assert len({int((mine + 1).sum()) for mine in shares}) == 1


def curve(mesh: Mesh, path: Path, packing: str, mutation: str = "none") -> list[tuple[float, ...]]:
    """(loss, norm, counted tokens) of each of four steps of batches, then the validation loss."""
    there = axes(mesh, MODEL.kv_replicas(mesh.tp))
    with MUTATIONS[mutation]():
        state = training(build(MODEL, there, True), there)
        samples = Samples(TokenFile(path), data(packing, True), seed=0)
        loader = samples.loader(there.dp, 0, shuffle=True, cp=there.part)
        made = [state.step(loader.step(), step) for step in range(1, 5)]
        found = [(float(x.loss), float(x.grad_norm), float(x.tokens)) for x in made]
        held = samples.loader(there.dp, 0, shuffle=False, cp=there.part)
        return [*found, (float(state.validate(held.epoch())),)]


def different(mine: list[tuple[float, ...]], whole: list[tuple[float, ...]]) -> bool:
    return any(a != pytest.approx(b, rel=1e-5) for a, b in zip(mine, whole, strict=True))


@pytest.mark.parametrize("packing", ["best-fit", "concat"])
@pytest.mark.parametrize("mesh", [Mesh(cp=2), Mesh(tp=2, cp=2), Mesh(cp=2, dp=2)], ids=str)
def test_a_run_has_the_same_curve(worlds: Worlds, tokens: Path, mesh: Mesh, packing: str) -> None:
    (whole,) = worlds(1).run(curve, Mesh(), tokens, packing)
    assert len({step[2] for step in whole[:-1]}) > 1, "steps count different numbers of tokens"
    for mine in worlds(mesh.world_size).run(curve, mesh, tokens, packing):
        assert not different(mine, whole), (mine, whole)


# --- bytes and places ----------------------------------------------------------------------------


@pytest.mark.parametrize(("recompute", "gathers"), [("none", 1), ("selective", 2), ("full", 2)])
def test_a_layer_sends_its_keys_and_values(
    worlds: Worlds, recompute: Recompute, gathers: int
) -> None:
    """(n - 1) / n of K and V of the whole sequence, and as much back."""
    whole = 4 * GLOBAL_BATCH * SEQUENCE * 2 * MODEL.num_key_value_heads * MODEL.head_dim
    layers = MODEL.num_hidden_layers
    for found in worlds(2).run(context_sent, MODEL, 2, recompute):
        assert found == {
            ("cp", "all_gather"): (gathers * layers, gathers * layers * whole // 2),
            ("cp", "reduce_scatter"): (layers, layers * whole // 2),
        }


def computed(size: int) -> tuple[int, list[int]]:
    """This rank, and the pairs of tokens of each call of attention."""
    pairs, original = [], ops.attention

    def attention(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        pairs.append(q.shape[1] * k.shape[1])
        return original(q, k, *rest)

    there = axes(Mesh(cp=size))
    with mock.patch.object(ops, "attention", attention):
        llama = build(TIED, there, False)
        loss(llama, share(there, 1)[0], there)
    return there.cp.rank, pairs


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_skips_the_keys_after_its_queries(worlds: Worlds, size: int) -> None:
    """2n + 1 of 4n pairs of chunks, on every rank."""
    chunk = SEQUENCE // (2 * size)
    for _, pairs in worlds(size).run(computed, size):
        assert sum(pairs) == (2 * size + 1) * chunk**2


@pytest.mark.parametrize("mutation", STEP)
def test_a_defect_of_a_step_is_caught(worlds: Worlds, mutation: str) -> None:
    assert any(worlds(4).run(on_mesh, MODEL, Mesh(cp=2, dp=2), False, 2, mutation))


@pytest.mark.parametrize("mutation", LOADED)
def test_a_defect_of_batches_is_caught(worlds: Worlds, tokens: Path, mutation: str) -> None:
    (whole,) = worlds(1).run(curve, Mesh(), tokens, "best-fit")
    found = worlds(4).run(curve, Mesh(cp=2, dp=2), tokens, "best-fit", mutation)
    assert any(different(mine, whole) for mine in found)


@pytest.mark.parametrize("mutation", DROPPED)
def test_a_defect_of_dropout_is_caught(worlds: Worlds, folder: Path, mutation: str) -> None:
    assert any(worlds(4).run(tuned, folder, Mesh(cp=2, dp=2), [(LORA, True)], mutation))
