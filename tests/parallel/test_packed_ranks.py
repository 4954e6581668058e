"""Packed instruction data on meshes: the loss curve of one rank, whatever tensor x data there is.

Few labels count, a different number on each rank and microstep, so a mean taken too early (per rank
or per microstep) shows at once.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from world import Worlds, axes

from llamax.collectives import Solo
from llamax.config import Data, Model, Optim
from llamax.data.tokens import Header, TokenFile, TokenWriter
from llamax.feed import Feed
from llamax.mesh import Mesh
from llamax.model import Llama
from llamax.ops import IGNORE_INDEX
from llamax.optim.zero1 import Zero1
from llamax.step import train_step, validation_loss

LLAMA2 = Model(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=61,
    initializer_range=0.1,
)
LLAMA3 = Model(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=61,
    initializer_range=0.1,
    rope_theta=500_000.0,
    tie_word_embeddings=True,
)
LENGTH, BATCH, STEPS = 32, 8, 4
MESHES = [(2, 1), (4, 1), (1, 2), (2, 2), (1, 4), (4, 2), (2, 4)]


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


def curve(model: Model, tp: int, dp: int, path: Path, packing: str) -> list[tuple[float, ...]]:
    """(loss, norm, counted tokens) of each step, then the validation loss."""
    there = axes(Mesh(tp=tp, dp=dp), max(1, tp // model.num_key_value_heads))
    llama = Llama(model, there.tp, sequence_parallel=True).init(0)
    optimizer = Zero1(
        dict(llama.named_parameters()),
        llama.shards,
        Optim(eps=1e-3),
        there,
        sequence_parallel=llama.sequence_parallel,
    )
    data = Data(sequence_length=LENGTH, global_batch=BATCH, micro_batch=1, packing=packing)
    feed = Feed(TokenFile(path), data, seed=0)
    loader = feed.loader(there.data, 0, shuffle=True)
    found = []
    for step in range(1, STEPS + 1):
        made = train_step(llama, optimizer, there, loader.step(), BATCH * LENGTH, 3e-3, step)
        found.append((float(made.loss), float(made.grad_norm), float(made.tokens)))
    held = feed.loader(there.data, 0, shuffle=False)
    return [*found, (float(validation_loss(llama, there, held, 99)),)]


@pytest.mark.parametrize("model", [LLAMA2, LLAMA3], ids=["llama2", "llama3"])
def test_every_mesh_has_the_same_curve(model: Model, tokens: Path, worlds: Worlds) -> None:
    (whole,) = worlds(1).run(curve, model, 1, 1, tokens, "best-fit")
    counts = [step[2] for step in whole[:-1]]
    assert len(set(counts)) > 1, "steps count different numbers of tokens"
    assert max(counts) < BATCH * LENGTH
    for tp, dp in MESHES:
        for rank in worlds(tp * dp).run(curve, model, tp, dp, tokens, "best-fit"):
            for mine, theirs in zip(rank, whole, strict=True):
                assert mine == pytest.approx(theirs, rel=2e-5), (tp, dp)


@pytest.mark.parametrize("packing", ["padded", "concat"])
def test_other_ways_of_packing_too(tokens: Path, worlds: Worlds, packing: str) -> None:
    (whole,) = worlds(1).run(curve, LLAMA3, 1, 1, tokens, packing)
    for rank in worlds(4).run(curve, LLAMA3, 2, 2, tokens, packing):
        for mine, theirs in zip(rank, whole, strict=True):
            assert mine == pytest.approx(theirs, rel=2e-5)


def test_the_mean_of_ranks_would_be_another(tokens: Path) -> None:
    """What the curves rest on: shares of a step count different numbers of tokens."""
    data = Data(sequence_length=LENGTH, global_batch=BATCH, micro_batch=1)
    loader = Feed(TokenFile(tokens), data, seed=0).loader(Solo("data"), 0, shuffle=True)
    counts = {int((batch.labels != IGNORE_INDEX).sum()) for batch in loader.step()}
    assert len(counts) > 2
