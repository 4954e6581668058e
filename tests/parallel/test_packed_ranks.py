"""Packed instruction data on meshes: the loss curve of one rank, whatever tensor x data there is.

Few labels count, a different number on each rank and microstep, so a mean taken too early (per rank
or per microstep) shows at once.  Full, LoRA and QLoRA; ``make drills`` takes every degree to 4 x 4.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from support.adapters import MODEL, base_folder, build
from support.models import LLAMA2, tiny
from support.world import Worlds, axes

from llamax.config.model import ModelConfig
from llamax.config.schema import DataConfig, FinetuneConfig, OptimConfig
from llamax.data.header import Header
from llamax.data.samples import Samples
from llamax.data.token_file import TokenFile, TokenWriter
from llamax.inference.evaluate import loss_of
from llamax.model.llama import Llama
from llamax.ops import IGNORE_INDEX
from llamax.optim.zero import Zero
from llamax.parallel.collectives import Solo
from llamax.parallel.mesh import Mesh
from llamax.training.step import TrainState

LLAMA3 = tiny(rope_theta=500_000.0, tie_word_embeddings=True)
LENGTH, BATCH, STEPS = 32, 8, 5
MESHES = {LLAMA2: [(2, 1), (2, 2), (1, 4)], LLAMA3: [(1, 2), (4, 1), (4, 2)]}
GRID = list(product((1, 2, 4), (1, 2, 4)))[1:]
WAYS = {
    "lora": FinetuneConfig(method="lora", r=4, dropout=0.1),
    "qlora": FinetuneConfig(method="qlora", r=4, dropout=0.1),
}
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "train.tokens"
    random = np.random.default_rng(0)
    with TokenWriter(path, Header("", 61, eos_id=2)) as writer:
        for _ in range(70):
            length = int(random.integers(3, 30))
            ids = random.integers(3, 61, length).astype(np.uint16)
            answer = int(random.integers(1, length))
            writer.add(ids, np.array([length]), length, np.arange(length) >= answer)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base") / "hub")


def curve(
    model: ModelConfig,
    tp: int,
    dp: int,
    path: Path,
    packing: str,
    way: str = "",
    base: Path = Path(),
) -> list[tuple[float, ...]]:
    """(loss, norm, counted tokens) of each step, then the validation loss."""
    there = axes(Mesh(tp=tp, dp=dp), max(1, tp // model.num_key_value_heads))
    if way:
        llama = build(base, there, WAYS[way], sequence=True)
    else:
        llama = Llama(model, there.tp, sequence_parallel=True).init(0)
    optimizer = Zero(
        llama.sharded_parameters(),
        OptimConfig(eps=1e-3),
        there,
        sequence_parallel=llama.sequence_parallel,
    )
    data = DataConfig(sequence_length=LENGTH, global_batch=BATCH, micro_batch=1, packing=packing)
    feed = Samples(TokenFile(path), data, seed=0)
    loader = feed.loader(there.data, 0, shuffle=True)
    state = TrainState(
        llama, optimizer, there, step_tokens=BATCH * LENGTH, learning_rate=lambda step: 3e-3
    )
    found = []
    for step in range(1, STEPS + 1):
        made = state.step(loader.step(), step)
        found.append((float(made.loss), float(made.grad_norm), float(made.tokens)))
    held = feed.loader(there.data, 0, shuffle=False)
    return [*found, (float(state.validate(held.epoch())),)]


@pytest.mark.parametrize("model", [LLAMA2, LLAMA3], ids=["llama2", "llama3"])
def test_every_mesh_has_the_same_curve(
    model: ModelConfig, tokens: Path, worlds: Worlds, full: bool, report: Callable[[str], None]
) -> None:
    (whole,) = worlds(1).run(curve, model, 1, 1, tokens, "best-fit")
    counts = [step[2] for step in whole[:-1]]
    assert len(set(counts)) > 1, "steps count different numbers of tokens"
    assert max(counts) < BATCH * LENGTH
    told = same(worlds, GRID if full else MESHES[model], whole, model, tokens)
    if full:
        report(f"all weights: {told}")


@pytest.mark.parametrize("way", WAYS)
def test_adapters_have_the_same_curve_on_every_mesh(
    way: str, tokens: Path, base: Path, worlds: Worlds, full: bool, report: Callable[[str], None]
) -> None:
    (whole,) = worlds(1).run(curve, MODEL, 1, 1, tokens, "best-fit", way, base)
    told = same(worlds, GRID if full else [(2, 4)], whole, MODEL, tokens, way, base)
    if full:
        report(f"{way}: {told}")


def same(
    worlds: Worlds,
    meshes: list[tuple[int, int]],
    whole: list[tuple[float, ...]],
    model: ModelConfig,
    tokens: Path,
    *tuning: object,
) -> str:
    """Check that the curves on all ``meshes`` equal that of one rank; a summary to print."""
    worst, last = 0.0, whole[-2][0]
    for tp, dp in meshes:
        for rank in worlds(tp * dp).run(curve, model, tp, dp, tokens, "best-fit", *tuning):
            for mine, theirs in zip(rank, whole, strict=True):
                assert mine == pytest.approx(theirs, rel=TOLERANCE), (tp, dp)
                worst = max(worst, abs(mine[0] / theirs[0] - 1))
    return (
        f"{STEPS} steps, loss {whole[0][0]:.4f} to {last:.4f}, equal within {worst:.1e} on "
        f"{len(meshes)} meshes, the largest tensor {meshes[-1][0]} x data {meshes[-1][1]}"
    )


@pytest.mark.parametrize("packing", ["padded", "concat"])
def test_other_ways_of_packing_too(tokens: Path, worlds: Worlds, packing: str) -> None:
    (whole,) = worlds(1).run(curve, LLAMA3, 1, 1, tokens, packing)
    for rank in worlds(4).run(curve, LLAMA3, 2, 2, tokens, packing):
        for mine, theirs in zip(rank, whole, strict=True):
            assert mine == pytest.approx(theirs, rel=TOLERANCE)


def test_the_mean_of_ranks_would_be_another(tokens: Path) -> None:
    """The data is a real test: shares of a step count different numbers of tokens."""
    data = DataConfig(sequence_length=LENGTH, global_batch=BATCH, micro_batch=1)
    loader = Samples(TokenFile(tokens), data, seed=0).loader(Solo("data"), 0, shuffle=True)
    counts = {int((batch.labels != IGNORE_INDEX).sum()) for batch in loader.step()}
    assert len(counts) > 2


def evaluated(tp: int, way: str, path: Path, base: Path) -> dict[str, float]:
    """The loss of ``llamax evaluate`` with all ranks on one tensor axis."""
    there = axes(Mesh(tp=tp), max(1, tp // MODEL.num_key_value_heads))
    data = DataConfig(sequence_length=LENGTH, global_batch=8, micro_batch=8)
    return loss_of(build(base, there, WAYS[way]), Samples(TokenFile(path), data, seed=0))


@pytest.mark.parametrize("way", WAYS)
def test_ranks_evaluate_as_one_does(way: str, tokens: Path, base: Path, worlds: Worlds) -> None:
    (whole,) = worlds(1).run(evaluated, 1, way, tokens, base)
    assert whole["tokens"] > 100
    for mine in worlds(4).run(evaluated, 4, way, tokens, base):
        assert mine == pytest.approx(whole, rel=TOLERANCE)
